# The recommended way to train a GPT-2-class model on FineWeb-Edu: an architecture and an optimizer that learn
# more from a token than GPT-2's do (docs/recipe.md). For a 12 GB card; on an 80 GB one add --batch_size=64
# --gradient_accumulation_steps=8: the same run, faster.
# $ python prepare_fineweb.py
# $ python train.py config/fineweb_125m_fast.py
# 2.6B tokens: 5,000 iterations of 524,288.
# Measured: nothing at this size yet. By published results, a loss of 3.28 on FineWeb takes 1.7B to
# 2.7B tokens with parts like these, and 5B to 10B with AdamW; the learning rate is theirs, too, converted.

out_dir = "out/fineweb_125m_fast"
dataset = "fineweb"

# 8 * 64 * 1024 = 524,288 tokens per iteration
batch_size = 8
gradient_accumulation_steps = 64
block_size = 1024

eval_interval = 250
log_interval = 10

arch = "modern"
n_layer = 12
n_head = 6  # each 128 wide
n_embd = 768
bias = False
dropout = 0.0

optimizer = "muon"
beta1 = 0.8
learning_rate = 4e-3
min_lr = 0.0
weight_decay = 0.1
schedule = "wsd"
warmup_iters = 50
cooldown_frac = 0.7  # iterations 1,500 to 5,000
keep_before_cooldown = True
max_iters = 5000
