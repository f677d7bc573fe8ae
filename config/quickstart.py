# A first model in two to three minutes on two CPU cores: it learns to write something like Python, byte by byte.
# 3.6M tokens: 3,500 iterations of 1,024.
# $ python prepare_fineweb.py --input=stdlib --encoding=bytes
# $ python train.py config/quickstart.py
# $ python sample.py --out_dir=out-quickstart --start="def "
# Measured on 2 cores of an Intel Xeon with torch 2.13: 2 minutes, validation loss 1.331 (nats per byte).

out_dir = "out-quickstart"
dataset = "stdlib"

# 8 * 1 * 128 = 1,024 tokens per iteration
batch_size = 8
gradient_accumulation_steps = 1
block_size = 128

eval_interval = 500
eval_iters = 20
log_interval = 100

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 3e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 3500
lr_decay_iters = 3500
beta2 = 0.99

compile = False  # so that it needs no C compiler; the model is too small to gain much
