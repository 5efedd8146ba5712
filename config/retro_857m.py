# RETRO of Megatron-LM's 843M (tools/retro: 24 layers, 1,024 wide, 16 heads), after a config of yours:
# torchrun --standalone --nproc_per_node=8 train.py config/my_run.py config/retro_857m.py
# Ours counts 410.32 M parameters with GPT-2's tied vocabulary. The published names (823M in arXiv 2310.07713, 878M with
# retrieval) count two matrices of 256,000 rows, 524 M more than none; arXiv 2304.06762 has the shape as Medium, of
# 410 M with GPT-2's, and its settings are these. --dry_run=True sizes it. It has not been run here.
out_dir = 'out/retro_857m'
eval_interval = 1000

n_layer = 24
n_head = 16
n_embd = 1024
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
learning_rate = 3e-4  # falls to a tenth
weight_decay = 0.1
