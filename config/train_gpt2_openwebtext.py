# GPT-2's 124 M decoder with retrieval on OpenWebText, after data/openwebtext/prepare.py: nanoGPT's run, on 8 GPUs.
# python -m retrieval.populate config/train_gpt2_openwebtext.py
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_openwebtext.py
# It has not been run here. Its 9 billion tokens are 150 million chunks: docs/scaling.md says which Milvus they want.
from data.documents import DatasetConfig

out_dir = 'out/gpt2_openwebtext'
train_datasets = [DatasetConfig('data/openwebtext/train.parquet')]
val_datasets = [DatasetConfig('data/openwebtext/val.parquet')]
eval_interval = 1000

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8  # 491,520 tokens a step
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1

retrieval_milvus_uri = 'http://localhost:19530'
retrieval_collection = 'openwebtext'
