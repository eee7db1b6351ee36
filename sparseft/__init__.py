"""Fine-tune a pretrained model by changing 0.01-10 % of its weights in place."""
