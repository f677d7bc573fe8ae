# Your own text of about 10M tokens (3M to 30M): a model of 6 layers.
# $ python prepare_fineweb.py --input=FOLDER
# $ python train.py config/text_10m.py --dataset=NAME  # prepare_fineweb.py prints this command
# 98.3M tokens: 6,000 iterations of 16,384, about 10 times the text. Val loss says when that is too
# often: best.pt keeps the weights of the lowest one.
# Measured: nothing yet.

out_dir = "out/text_10m"
dataset = "mine"

# 32 * 1 * 512 = 16,384 tokens per iteration
batch_size = 32
gradient_accumulation_steps = 1
block_size = 512

eval_interval = 250
eval_iters = 50
log_interval = 10

arch = "modern"
n_layer = 6
n_head = 3
n_embd = 384
bias = False
dropout = 0.2  # more than one pass over the text: without it the model learns it by heart

optimizer = "muon"
beta1 = 0.8
beta2 = 0.99  # few tokens per iteration: a longer memory of squared gradients
learning_rate = 4e-3
min_lr = 0.0
weight_decay = 0.1
schedule = "wsd"
warmup_iters = 100
max_iters = 6000
