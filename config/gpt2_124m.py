# Reproduction of GPT-2 124M on 10B tokens of FineWeb-Edu, for one 80 GB card such as the H100.
# $ python prepare_fineweb.py
# $ python train.py config/gpt2_124m.py
# 10.0B tokens: 19,073 iterations of 524,288, one pass over FineWeb-Edu's sample-10BT.
# On a 12 GB card add --batch_size=8 --gradient_accumulation_steps=64: the same run, slower.
# Measured: nothing yet.

out_dir = "out/gpt2_124m"
dataset = "fineweb"

# 64 * 8 * 1024 = 524,288 tokens per iteration
batch_size = 64
gradient_accumulation_steps = 8
block_size = 1024

eval_interval = 500
log_interval = 10

n_layer = 12
n_head = 12
n_embd = 768
bias = False
dropout = 0.0

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 715
max_iters = 19073
lr_decay_iters = 19073
weight_decay = 0.1
