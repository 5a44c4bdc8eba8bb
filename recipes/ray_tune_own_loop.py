"""A train function that was there before; the lines that end in `# +` make it compress its model."""

import torch
from ray import tune
from transformers import BertConfig, BertForSequenceClassification

from orchestrator.own_loop import convert, export, measure, prepare, prune  # +


def batches(count, seed):
    """Sentences of made-up tokens, and whether one of a few tokens is among them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(5, 64, (32, 16), generator=generator)
        yield {"input_ids": ids, "labels": (ids < 8).any(dim=1).long()}


def evaluate(answer):
    right = [answer(batch).argmax(-1) == batch["labels"] for batch in batches(8, seed=1)]
    return {"accuracy": torch.cat(right).float().mean().item()}


def train(config, num_steps=120):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, intermediate_size=64, **shape))
    seen = list(batches(16, seed=2))  # +
    pruned = prune(model, config["prune"], num_steps=num_steps, batches=seen)  # +
    prepare(model, config["quantize"])  # +
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["learning_rate"])
    for batch in batches(num_steps, seed=0):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pruned.step()  # +
    pruned.finish()  # +
    folder = export(convert(model, config["quantize"]), "artifact", max_length=16)  # +
    artifact = tune.Checkpoint.from_directory(folder)  # +
    tune.report(measure(folder, evaluate), checkpoint=artifact)  # of the model as it is served


param_space = {
    "learning_rate": tune.loguniform(1e-3, 5e-3),
    "prune": tune.grid_search(["none", {"method": "structured", "neurons": 0.5}]),  # +
    "quantize": tune.choice(["none", "W8A8"]),  # +
}
for result in tune.Tuner(train, param_space=param_space).fit():
    print(result.config, result.metrics, result.checkpoint)
