# Your own text of about 1M tokens (below 3M): a small model with much dropout.
# $ python prepare_fineweb.py --input=FOLDER
# $ python train.py config/text_1m.py --dataset=NAME  # prepare_fineweb.py prints this command
# 10.2M tokens: 2,500 iterations of 4,096, about 10 times the text. Val loss says when that is too
# often: best.pt keeps the weights of the lowest one.
# Measured on tiny Shakespeare by characters, 1.0M of them for training, in fp32, one seed: validation loss
# 1.475, lowest at the end; at a learning rate of 4e-3 1.487. 70 minutes on one core of an Intel Xeon, by its
# time per iteration, 1.67 s. With GPT-2's ids, or on a GPU: nothing yet.

out_dir = "out/text_1m"
dataset = "mine"

# 16 * 1 * 256 = 4,096 tokens per iteration
batch_size = 16
gradient_accumulation_steps = 1
block_size = 256

eval_interval = 100
eval_iters = 20
log_interval = 10

arch = "modern"
n_layer = 4
n_head = 2
n_embd = 256
bias = False
dropout = 0.3  # more than one pass over the text: without it the model learns it by heart

optimizer = "muon"
beta1 = 0.8
beta2 = 0.99  # few tokens per iteration: a longer memory of squared gradients
learning_rate = 2e-3
min_lr = 0.0
weight_decay = 0.1
schedule = "wsd"
warmup_iters = 50
max_iters = 2500
