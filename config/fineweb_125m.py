# GPT-2 124M on FineWeb-Edu, for a 12 GB card such as the RTX 4070.
# $ python prepare_fineweb.py
# $ python train.py config/fineweb_125m.py
# 5.2B tokens: 10,000 iterations of 524,288.
# Measured in short runs on an H200 (docs/measuring.md): 476,000 tokens/s with batch_size=8, 3 hours in all.
# Not measured: the final loss, other cards. nanoGPT needs 9,344 ms for one such iteration on an RTX 4070,
# which is 26 hours in all.

out_dir = "out/fineweb_125m"
dataset = "fineweb"

# 8 * 64 * 1024 = 524,288 tokens per iteration
batch_size = 8
gradient_accumulation_steps = 64
block_size = 1024

eval_interval = 500
log_interval = 10

n_layer = 12
n_head = 12
n_embd = 768
bias = False
dropout = 0.0

learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 500
max_iters = 10000
lr_decay_iters = 10000
beta2 = 0.99  # not compared with the default, 0.95, at so many tokens per iteration
weight_decay = 0.1
