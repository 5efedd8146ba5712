# The quickstart on English prose, after data/peps/prepare.py: python train.py config/quickstart.py config/peps.py
from data.documents import DatasetConfig

out_dir = 'out/peps'
train_datasets = [DatasetConfig('data/peps/train.parquet')]
val_datasets = [DatasetConfig('data/peps/val.parquet')]
tokenizer = 'data/peps/tokenizer.json'
retrieval_embedding_model = 'out/peps_embedding'
retrieval_milvus_uri = 'out/peps.db'
retrieval_collection = 'peps'
