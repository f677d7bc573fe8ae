# A first model in two to five minutes on two CPU cores: it learns to write something like Python, byte by
# byte. Small as it is, it is trained with the modern recipe, which gets further in that time than GPT-2's
# architecture with AdamW.
# 1.8M tokens: 1,800 iterations of 1,024.
# $ python prepare_fineweb.py --input=stdlib --encoding=bytes
# $ python train.py config/quickstart.py
# $ python sample.py --out_dir=out-quickstart --start="def "
# Measured with torch 2.13: 2 minutes 52 seconds on 2 cores of an AMD EPYC, 5 minutes 11 seconds on 2 of
# another one (Zen 3, without AVX-512); there the validation loss is 1.137 (nats per byte). GPT-2's
# architecture with AdamW, on an Intel Xeon, needs 3,500 iterations for a loss of 1.331.

out_dir = "out-quickstart"
dataset = "stdlib"

# 8 * 1 * 128 = 1,024 tokens per iteration
batch_size = 8
gradient_accumulation_steps = 1
block_size = 128

eval_interval = 300
eval_iters = 20
log_interval = 100

arch = "modern"
n_layer = 4
n_head = 2
n_embd = 128
bias = False

optimizer = "muon"
beta1 = 0.8
learning_rate = 4e-3
min_lr = 0.0
schedule = "wsd"
warmup_iters = 50
max_iters = 1800

compile = False  # so that it needs no C compiler; the model is too small to gain much
