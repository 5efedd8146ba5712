"""
Texts to unit vectors, through one SentenceTransformer: any model of the hub by name, or a folder that holds one.
"""
import contextlib
import hashlib
import logging
import os
from dataclasses import dataclass

from system import quiet_transformers

import numpy as np

from configurator import UserError

os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')


@dataclass
class EmbedderInfo:
    """What a collection remembers of its embedding model."""
    name: str
    fingerprint: str
    dimension: int


class Embedder:
    """A sentence embedding model. `fingerprint` is a hash of its weights, the same for a copy elsewhere."""

    def __init__(self, name, device='cpu'):
        import torch
        from sentence_transformers import SentenceTransformer  # takes seconds to import
        quiet_transformers()
        is_folder = os.path.isdir(name)
        try:
            with quiet('huggingface_hub'), quiet('sentence_transformers'):
                self.model = SentenceTransformer(name, device=device, local_files_only=is_folder)
        except Exception as error:  # a hub's refusals come as several unrelated classes
            raise UserError(f'no embedding model {name!r}: it is no folder that holds a SentenceTransformer, and the '
                            f'hub did not provide it ({type(error).__name__}). Fit the offline one with python -m '
                            f'retrieval.static_embedding CONFIG, or name an existing model in '
                            f'retrieval_embedding_model') from error
        self.name = name
        self.dimension = self.model.get_embedding_dimension()
        digest = hashlib.blake2b(digest_size=8)
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        self.fingerprint = digest.hexdigest()

    def embed(self, texts):
        """texts (n) to unit vectors (n, D), float32."""
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        vectors = self.model.encode(texts, batch_size=256, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)


@contextlib.contextmanager
def quiet(name):
    """Silence a library's warnings: our own error message says what happened."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
