# A small RETRO on the Python source of this machine: two CPU cores, a few minutes. `make quickstart` runs it.
from data.documents import DatasetConfig

out_dir = 'out/quickstart'
eval_interval = 300
eval_tokens = 80_000
log_interval = 10

train_datasets = [DatasetConfig('data/python_source/train.parquet')]
val_datasets = [DatasetConfig('data/python_source/val.parquet')]
tokenizer = 'data/python_source/tokenizer.json'
gradient_accumulation_steps = 1
batch_size = 8
block_size = 256

n_layer = 4
n_head = 4
n_embd = 128

retrieval_chunk_size = 64
retrieval_layers = [1, 3]
retrieval_k_neighbors = 0  # pointers alone: here neighbors, too, gain nothing (docs/pays.md); 2 for both
retrieval_embedding_model = 'out/static_embedding'
retrieval_milvus_uri = 'out/milvus.db'
retrieval_collection = 'python_source'
retrieval_prefetch_batches = 16

learning_rate = 3e-3
max_iters = 600
warmup_iters = 60
compile = False  # needs a C++ compiler
