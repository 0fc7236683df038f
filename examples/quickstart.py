"""The Python use in fifteen lines; the README shows it, a test runs it."""

import torch
from transformers import BertConfig, BertForSequenceClassification

import melora_fx
from exporters import export_onnx

model = BertForSequenceClassification(BertConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4))
inputs = {"input_ids": torch.arange(64).view(4, 16), "attention_mask": torch.ones(4, 16, dtype=torch.long)}
config = melora_fx.MELoRAConfig(rank=8, num_blocks=8, alpha=16)
print(melora_fx.match(model, ["query", "value"], config))  # a dry run: what would be adapted
model = melora_fx.rewrite(model, ["query", "value"], config, keep_trainable=["classifier"])
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
compiled = torch.compile(model, backend="aot_eager")  # leave the backend out for speed
for _ in range(3):
    compiled(**inputs, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
melora_fx.save_adapter(model, "adapter")  # adapter.safetensors, the trained head with it
print(export_onnx(model, inputs, "unmerged.onnx", adapter="keep"))  # the adapter stays visible in the graph
melora_fx.fold(model)  # merged: plain modules again
print(export_onnx(model, inputs, "merged.onnx"))  # the base graph, node for node
