# A package that the quickstart's model never saw joins its knowledge base, without training (docs/knowledge.md), after
# data/knowledge_update/prepare.py: python -m retrieval.populate config/quickstart.py config/knowledge_update.py
from data.documents import DatasetConfig

train_datasets = [DatasetConfig('data/python_source/train.parquet'),
                  DatasetConfig('data/knowledge_update/added.parquet')]
val_datasets = [DatasetConfig('data/knowledge_update/held_out.parquet')]
retrieval_collection = 'knowledge_update'  # beside the quickstart's own, which stays as it is
