"""What is made of a configuration: the sparse checkpoint, its card, and the fine-tuned one."""
