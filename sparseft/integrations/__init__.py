"""Wiring into other libraries; the only importers of them.

From files to a fine-tuned model, which is all that `sparseft train` does:

    splits = examples.prepare(rows.read("train.jsonl"), rows.read("dev.jsonl"))   # finds task, columns, classes
    loaded = models.load("path/or/hub-id", splits, seed=0)           # model, tokenizer, names of its new parameters
    encoded = encoding.encode(splits, loaded.tokenizer, max_length=128)
    mask = choosing.choose(loaded, encoded, "fish", density=0.005)   # None for method "full"
    result = training.train(loaded, encoded, mask, epochs=3)

`inputs.load` does the first three. `train` changes the model in place: load it again for the next method.
"""
