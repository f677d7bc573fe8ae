# A 40M model (12 layers, 384 wide) on FineWeb-Edu: the quick one for a 12 GB card such as the RTX 4070.
# $ python prepare_fineweb.py
# $ python train.py config/fineweb_40m.py
# 5.2B tokens: 10,000 iterations of 524,288.
# Measured: nothing yet. For orientation, nanoGPT needs 3,905 ms for one such iteration on an RTX 4070,
# which is 11 hours in all.

out_dir = "out/fineweb_40m"
dataset = "fineweb"

# 16 * 32 * 1024 = 524,288 tokens per iteration
batch_size = 16
gradient_accumulation_steps = 32
block_size = 1024

eval_interval = 500
log_interval = 10

n_layer = 12
n_head = 12
n_embd = 384
bias = False
dropout = 0.0

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 500
max_iters = 10000
lr_decay_iters = 10000
beta2 = 0.99  # not compared with the default, 0.95, at so many tokens per iteration
weight_decay = 0.1
