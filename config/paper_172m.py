# RETRO's smallest model with the paper's sizes and settings (arXiv 2112.04426, tables 2 and 10, appendix C.1), after a
# config of yours: torchrun --standalone --nproc_per_node=8 train.py config/my_run.py config/paper_172m.py
# Ours counts 194.77 M parameters with GPT-2's tied vocabulary, of which 46.91 M are embeddings. The paper's 172 M are
# without them; docs/paper.md says where the two differ, and why. It has not been run here.
out_dir = 'out/paper_172m'
eval_interval = 5000

n_layer = 12
n_head = 14  # of 64; the paper has 16 of 64, wider together than the model
n_embd = 896
block_size = 2048

retrieval_chunk_size = 64
retrieval_k_neighbors = 2
retrieval_layers = [6, 9, 12]
retrieval_encoder_layers = 2
retrieval_copy = False  # this and the next three are nanoRETRO's own
retrieval_pointers = 0
token_mix = False
copy_own_context = False

batch_size = 8
gradient_accumulation_steps = 32  # 256 sequences a step
max_iters = 800_000  # 419,430,400,000 tokens
learning_rate = 2e-4  # falls to a tenth
warmup_iters = 750
weight_decay = 0.1
