# RETRO of GPT-2's small decoder as NeMo and Megatron-LM have it (NeMo's retro/300m.yaml; Small in arXiv 2304.06762,
# tables 9 and 10), after a config of yours: python train.py config/my_run.py config/retro_124m.py
# Ours counts 149.00 M parameters with GPT-2's tied vocabulary, 125 M without retrieval. That paper has 148 M; it is the
# 300M of NeMo and the 307M of Megatron-LM. --dry_run=True sizes it. It has not been run here.
out_dir = 'out/retro_124m'
eval_interval = 1000

n_layer = 12
n_head = 12
n_embd = 768
bias = True
dropout = 0.1
block_size = 2048

retrieval_k_neighbors = 2
retrieval_encoder_layers = 2
retrieval_copy = False  # the published model; what pays sooner (docs/pays.md) is True here and below, and 32 pointers
retrieval_pointers = 0
token_mix = False
copy_own_context = False

batch_size = 8
gradient_accumulation_steps = 32  # 256 sequences a step
max_iters = 750_000
lr_decay_iters = 650_000  # 166.4 million sequences
warmup_iters = 636  # 162,761
learning_rate = 6e-4  # falls to a tenth
weight_decay = 0.1
