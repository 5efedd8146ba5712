# RETRO of Megatron-LM's 2B (24 layers, 2,048 wide, 16 heads), after a config of yours:
# torchrun --standalone --nproc_per_node=8 train.py config/my_run.py config/retro_2b.py
# Ours counts 1.53 B parameters with GPT-2's tied vocabulary. The published names (2.25B in arXiv 2310.07713, 2.5B with
# retrieval) count two matrices of 256,000 rows, 1,049 M more than none; arXiv 2304.06762 has the shape as XL, of 1.5 B
# with GPT-2's, in 32 heads, and its settings are these. --dry_run=True sizes it. It has not been run here.
out_dir = 'out/retro_2b'
eval_interval = 1000

n_layer = 24
n_head = 16
n_embd = 2048
block_size = 2048

retrieval_k_neighbors = 2
retrieval_encoder_layers = 2
retrieval_copy = False  # the published model; what pays sooner (docs/pays.md) is True here and below, and 32 pointers
retrieval_pointers = 0
token_mix = False
copy_own_context = False

batch_size = 4
gradient_accumulation_steps = 128  # 512 sequences a step
max_iters = 375_000
lr_decay_iters = 325_000  # 166.4 million sequences
warmup_iters = 318  # 162,761
learning_rate = 2e-4  # falls to a tenth
weight_decay = 0.1
parallel = 'fsdp'
