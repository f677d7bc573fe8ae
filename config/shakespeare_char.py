# Tiny Shakespeare by characters: nanoGPT's first example, with its sizes and settings.
# 81.9M tokens: 5,000 iterations of 16,384, 82 times the text; best.pt keeps the lowest val loss.
# $ python prepare_fineweb.py --encoding=characters --out_dir=data/shakespeare_char \
#       --input=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
# $ python train.py config/shakespeare_char.py
# $ python sample.py --init_from=best
# nanoGPT's README says 1.4697 for it, after about three minutes on one A100.
# On a CPU, nanoGPT's smaller model, for which its README says 1.88 after about three minutes:
# $ python train.py config/shakespeare_char.py --compile=False --block_size=64 --batch_size=12 --n_layer=4 \
#       --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0 --eval_iters=20
# Measured with these flags: 1.899 after 2m34s on one core of an AMD EPYC, torch 2.13. On a GPU: nothing yet.

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

# 64 * 1 * 256 = 16,384 tokens per iteration
batch_size = 64
gradient_accumulation_steps = 1
block_size = 256

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # the model learns the text by heart: only a lower val loss is worth a file

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99  # few tokens per iteration: a longer memory of squared gradients
warmup_iters = 100
max_iters = 5000
lr_decay_iters = max_iters
