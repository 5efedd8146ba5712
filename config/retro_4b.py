# RETRO of a decoder of 4B (48 layers, 2,560 wide, 32 heads), after a config of yours:
# torchrun --nnodes=8 --nproc_per_node=8 ... train.py config/my_run.py config/retro_4b.py
# Ours counts 4.46 B parameters with GPT-2's tied vocabulary, 3.9 B without retrieval. No published RETRO of this shape
# was found: width, heads and learning rate are those of GPT-3 2.7B (arXiv 2005.14165, table 2.1), and all else is arXiv
# 2304.06762's of its XL. --dry_run=True sizes it. It has not been run here.
out_dir = 'out/retro_4b'
eval_interval = 1000

n_layer = 48
n_head = 32
n_embd = 2560
block_size = 2048

retrieval_k_neighbors = 2
retrieval_encoder_layers = 2
retrieval_copy = False  # the published model; what pays sooner (docs/pays.md) is True here and below, and 32 pointers
retrieval_pointers = 0
token_mix = False
copy_own_context = False

batch_size = 2
gradient_accumulation_steps = 256  # 512 sequences a step
max_iters = 375_000
lr_decay_iters = 325_000  # 166.4 million sequences
warmup_iters = 318  # 162,761
learning_rate = 1.6e-4  # falls to a tenth
weight_decay = 0.1
parallel = 'fsdp'
