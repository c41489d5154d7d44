"""The tutorial's script as a person runs it: load, one answer, 60 updates, adapter, merged weights. Prints seconds from its start.

usage: WORK=/tmp/work python3 benchmarks/tutorial_whole.py OUTPUT_FOLDER
"""

import json
import os
import re
import sys
import time
from pathlib import Path

began, marks = time.time(), {}
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
work, output = os.environ.get("WORK", "/tmp/work"), sys.argv[1]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def mark(name: str) -> None:
    marks[name] = round(time.time() - began, 1)
    print(name, marks[name], flush=True)


from unsloth import FastLanguageModel  # noqa: E402, I001  (before trl and transformers: it patches them)
from datasets import Dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

mark("imported")
model, tokenizer = FastLanguageModel.from_pretrained(
    f"{work}/model", max_seq_length=2048, dtype=None, load_in_4bit=True
)
mark("loaded")
source = Path(__file__).with_name("tutorial.py").read_text(encoding="utf-8")
template = re.search(r'TEMPLATE = """(.*?)"""', source, re.DOTALL)[1]
prompt = template[: template.index("<think>") + len("<think>")]
question = "一个患有急性阑尾炎的病人已经发病5天,腹痛稍有减轻但仍然发热,在体检时发现右下腹有压痛的包块,此时应如何处理?"
FastLanguageModel.for_inference(model)
inputs = tokenizer([prompt.replace("{}", question, 1)], return_tensors="pt").to("cuda")
answer = model.generate(
    input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=1200, use_cache=True
)
new = int(answer.shape[1] - inputs.input_ids.shape[1])
mark("answered")
model = FastLanguageModel.get_peft_model(
    model, r=16, target_modules=MODULES, lora_alpha=16, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth",
    random_state=3407, use_rslora=False, loftq_config=None,
)  # fmt: skip
FastLanguageModel.for_training(model)
with open(f"{work}/rows.json", encoding="utf-8") as stream:
    rows = json.load(stream)
columns = ("Question", "Complex_CoT", "Response")
texts = [dict(text=template.format(*(row[name] for name in columns)) + tokenizer.eos_token) for row in rows]
arguments = SFTConfig(
    output_dir=f"{output}/trainer", per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=5, max_steps=60,
    learning_rate=2e-4, bf16=True, logging_steps=10, optim="adamw_8bit", weight_decay=0.01, lr_scheduler_type="linear", seed=3407,
    report_to="none", save_strategy="no", dataset_text_field="text", max_length=2048, disable_tqdm=True,
)  # fmt: skip
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(texts), args=arguments)
mark("prepared")
trainer.train()
mark("trained")
model.save_pretrained(output)
tokenizer.save_pretrained(output)
model.save_pretrained_merged(output, tokenizer, save_method="merged_16bit")
mark("saved")
seconds = marks["answered"] - marks["loaded"]
print(json.dumps(dict(marks=marks, answer=dict(tokens=new, tokens_per_s=round(new / seconds, 1)))), flush=True)
