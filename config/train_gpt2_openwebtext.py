# GPT-2's 124 M decoder with retrieval on OpenWebText, after data/openwebtext/prepare.py: nanoGPT's run, on 8 GPUs.
# python -m retrieval.populate config/train_gpt2_openwebtext.py
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_openwebtext.py
# It has not been run here. Its 9 billion tokens are 150 million chunks: docs/scaling.md says which Milvus they want.
from data.documents import DatasetConfig

out_dir = 'out/gpt2_openwebtext'
train_datasets = [DatasetConfig('data/openwebtext/train.parquet')]
val_datasets = [DatasetConfig('data/openwebtext/val.parquet')]
eval_interval = 1000

# train.py's defaults are nanoGPT's: 600,000 steps of 491,520 tokens
retrieval_milvus_uri = 'http://localhost:19530'
retrieval_collection = 'openwebtext'
