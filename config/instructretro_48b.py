# A plan of InstructRetro's Retro 48B (arXiv 2310.07713, appendix A.2; Megatron-LM's pretrain-nextlm-43b-retro.sh), to
# size: python train.py config/instructretro_48b.py --dry_run=True
# Ours counts 44.74 B parameters with GPT-2's tied vocabulary: the published GPT 43B has two matrices of 256,000 rows,
# 4.2 B, beside SwiGLU and rotary positions. It had read 1.1 trillion tokens before it read the 25 million sequences
# below with retrieval, on 64 machines of 8 GPUs, each a tensor-parallel group, which nanoRETRO has not.
out_dir = 'out/instructretro_48b'
eval_interval = 1260

n_layer = 48
n_head = 64
n_embd = 8192
block_size = 4096

retrieval_k_neighbors = 2
retrieval_encoder_layers = 2
retrieval_copy = False
retrieval_pointers = 0
token_mix = False
copy_own_context = False

batch_size = 1
gradient_accumulation_steps = 768  # 768 sequences a step
max_iters = 32_552  # 25 million sequences
lr_decay_iters = 30_924  # 23.75 million
warmup_iters = 22  # 16,667
learning_rate = 9e-6  # falls to a tenth
weight_decay = 0.1
parallel = 'fsdp'
activation_checkpointing = 'full'
retrieval_milvus_uri = 'http://localhost:19530'
retrieval_index = 'DISKANN'
