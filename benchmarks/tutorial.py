"""What a user would run instead, timed on the standard workload: one JSON line a run.

  python3 benchmarks/tutorial.py unsloth          the tutorial's own script: unsloth, 2 x 4, checkpointing "unsloth"
  python3 benchmarks/tutorial.py transformers     the same recipe in plain transformers + peft + trl + bitsandbytes
  options: --micro-batch 8 --accumulation 1 --no-checkpointing --steps 20 --merge FOLDER

Times skip the first 8 steps; tokens are real tokens (no padding counted).
"""

import argparse
import itertools
import json
import os
import time

start = time.time()
parser = argparse.ArgumentParser()
parser.add_argument("engine", choices=["unsloth", "transformers"])
parser.add_argument("--micro-batch", type=int, default=2)
parser.add_argument("--accumulation", type=int, default=4)
parser.add_argument("--no-checkpointing", action="store_true")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--merge", help="folder: save the merged 16-bit weights there too, as the tutorial does")
args = parser.parse_args()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
work = os.environ.get("WORK", "/tmp/work")
checkpointing = not args.no_checkpointing

import torch  # noqa: E402

if args.engine == "unsloth":
    from unsloth import FastLanguageModel  # before trl and transformers: it patches them
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

imported = time.time()
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
lora = dict(r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS)
extra = dict(gradient_checkpointing=checkpointing)
if args.engine == "unsloth":
    model, tokenizer = FastLanguageModel.from_pretrained(
        f"{work}/model", max_seq_length=2048, dtype=None, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        **lora,
        use_gradient_checkpointing="unsloth" if checkpointing else False,
        random_state=3407,
        use_rslora=False,
        loftq_config=None,
    )
else:
    tokenizer = AutoTokenizer.from_pretrained(f"{work}/model")
    tokenizer.pad_token = tokenizer.pad_token or "<|reserved_special_token_0|>"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        f"{work}/model", quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
    if checkpointing:
        extra["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
loaded = time.time()

TEMPLATE = """Below is an instruction that describes a task, paired with an input that provides further context.
Write a response that appropriately completes the request.
Before answering, think carefully about the question and create a step-by-step chain of thoughts to ensure a logical and accurate response.
### Instruction:
You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning.
Please answer the following medical question.
### Question:
{}
### Response:
<think>
{}
</think>
{}"""
with open(f"{work}/rows.json") as stream:
    rows = json.load(stream)
dataset = Dataset.from_list(
    [{"text": TEMPLATE.format(r["Question"], r["Complex_CoT"], r["Response"]) + tokenizer.eos_token} for r in rows]
)
ends, losses = [], []


class Clock(TrainerCallback):
    def on_step_end(self, *_, **__):
        torch.cuda.synchronize()
        ends.append(time.time())

    def on_log(self, *_, logs=None, **__):
        if logs and "loss" in logs:
            losses.append(float(logs["loss"]))


config = SFTConfig(
    output_dir="/tmp/out",
    per_device_train_batch_size=args.micro_batch,
    gradient_accumulation_steps=args.accumulation,
    warmup_steps=5,
    max_steps=args.steps,
    learning_rate=2e-4,
    bf16=True,
    logging_steps=1,
    optim="adamw_8bit",
    weight_decay=0.01,
    lr_scheduler_type="linear",
    seed=3407,
    report_to="none",
    save_strategy="no",
    dataset_text_field="text",
    max_length=2048,
    disable_tqdm=True,
    **extra,
)
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=dataset, args=config, callbacks=[Clock()])
lengths = [len(x) for x in trainer.train_dataset["input_ids"]]
torch.cuda.reset_peak_memory_stats()
began = time.time()
trainer.train()
peak = torch.cuda.max_memory_allocated()
trained = time.time()
if args.merge:
    model.save_pretrained_merged(args.merge, tokenizer, save_method="merged_16bit")
saved = time.time()
steps = [b - a for a, b in itertools.pairwise(ends[7:])]
step = sum(steps) / len(steps)
tokens = sum(lengths) / len(lengths) * args.micro_batch * args.accumulation
print(
    "RESULT "
    + json.dumps(
        dict(
            engine=args.engine,
            micro_batch=args.micro_batch,
            accumulation=args.accumulation,
            checkpointing=checkpointing,
            import_s=round(imported - start, 1),
            load_s=round(loaded - imported, 1),
            first_step_s=round(ends[0] - began, 1),
            started_s=round(ends[0] - start, 1),
            step_s=round(step, 3),
            median_step_s=round(sorted(steps)[len(steps) // 2], 3),
            tokens_per_s=round(tokens / step),
            train_s=round(trained - began, 1),
            merge_s=round(saved - trained, 1),
            total_s=round(saved - start, 1),
            peak_gib=round(peak / 2**30, 2),
            losses=losses,
        )
    ),
    flush=True,
)
