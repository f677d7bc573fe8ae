# Your own text of about 100M tokens (30M to 1B): a model of 8 layers.
# $ python prepare_fineweb.py --input=FOLDER
# $ python train.py config/text_100m.py --dataset=NAME  # prepare_fineweb.py prints this command
# 524.3M tokens: 4,000 iterations of 131,072, about 5 times the text. Val loss says when that is too
# often: best.pt keeps the weights of the lowest one.
# Measured: nothing yet.

out_dir = "out/text_100m"
dataset = "mine"

# 16 * 8 * 1024 = 131,072 tokens per iteration
batch_size = 16
gradient_accumulation_steps = 8
block_size = 1024

eval_interval = 250
eval_iters = 50
log_interval = 10

arch = "modern"
n_layer = 8
n_head = 4
n_embd = 512
bias = False
dropout = 0.1  # more than one pass over the text: without it the model learns it by heart

optimizer = "muon"
beta1 = 0.8
beta2 = 0.99  # few tokens per iteration: a longer memory of squared gradients
learning_rate = 4e-3
min_lr = 0.0
weight_decay = 0.1
schedule = "wsd"
warmup_iters = 100
max_iters = 4000
