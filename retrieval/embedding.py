"""
Texts to unit vectors, through one SentenceTransformer: any model of the hub by name, or a folder that holds one.
"""
import contextlib
import hashlib
import logging
import os
from dataclasses import dataclass

from system import pick_dtype, quiet_transformers, say

import numpy as np

from configurator import UserError, reason_of

# of a transformer's config, what its vectors depend on beside the weights
NETWORK = ('num_attention_heads', 'hidden_act', 'layer_norm_eps', 'position_embedding_type', 'rope_theta')

os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')


@dataclass
class EmbedderInfo:
    """What a collection remembers of its embedding model."""
    name: str
    fingerprint: str
    dimension: int


class Embedder:
    """
    A sentence embedding model. `fingerprint` is a hash of all that its vectors depend on, and of nothing else: the same
    for a copy elsewhere, or one without weights that are not in use, and on a machine of another precision. A
    transformer computes in bfloat16 where the machine is fast at it, unless `dtype` is 'float32'; the cosine to its
    vectors in float32 is above 0.999.
    """

    def __init__(self, name, device='cpu', dtype='auto'):
        from sentence_transformers import SentenceTransformer  # takes seconds to import
        quiet_transformers()
        is_folder = os.path.isdir(name)
        try:
            with quiet('huggingface_hub'), quiet('sentence_transformers'):
                self.model = SentenceTransformer(name, device=device, local_files_only=is_folder)
        except Exception as error:  # a hub's refusals come as several unrelated classes
            raise UserError(f'no embedding model {name!r}: it is no folder that holds a whole SentenceTransformer, and '
                            f'the hub did not provide it ({reason_of(error)}). Fit the offline one with python -m '
                            f'retrieval.static_embedding CONFIG, or name an existing model in '
                            f'retrieval_embedding_model') from error
        self.name = name
        self.model.eval()
        self.dimension = self.model.get_embedding_dimension()
        self.prompt = self.model.prompts.get(self.model.default_prompt_name) or ''  # encode() puts it before texts
        self.fingerprint = fingerprint(self.model, self.prompt)
        self.is_transformer = hasattr(self.model[0], 'auto_model') and callable(self.model.tokenizer)
        if self.is_transformer and pick_dtype(dtype, device) == 'bfloat16':  # float16 would overflow in some models
            for parameter in self.model.parameters():  # not of the buffers: those of rotary embeddings need float32
                parameter.data = parameter.data.bfloat16()
        self.batch = (32 if device == 'cpu' else 256) if self.is_transformer else 4096  # a CPU's cache is small
        if not os.path.isfile(os.path.join(name, 'modules.json')) and not is_cached(name, 'modules.json'):
            say(f'{name} is no SentenceTransformer, as it has no modules.json: a text is embedded as the mean of its '
                f"tokens' vectors, which the model may not have been trained for")

    def embed(self, texts):
        """texts (n) to unit vectors (n, D), float32; zeros stay zeros. UserError if the model makes anything else."""
        if not texts:
            return np.zeros((0, self.dimension), dtype=np.float32)
        order = np.arange(len(texts))
        if self.is_transformer:  # whose batches are padded to their longest text
            order = np.argsort(-self.count_tokens(texts), kind='stable')
        parts = [self.model.encode([texts[i] for i in order[start:start + self.batch]], batch_size=min(self.batch, 256),
                                   convert_to_tensor=True, show_progress_bar=False).float().cpu().numpy()
                 for start in range(0, len(texts), self.batch)]
        vectors = np.empty((len(texts), *parts[0].shape[1:]), dtype=np.float32)
        vectors[order] = np.concatenate(parts)
        if vectors.shape != (len(texts), self.dimension):
            raise UserError(f'embedding model {self.name!r} gives vectors of shape {vectors.shape[1:]} for texts such '
                            f'as {texts[0][:80]!r}, and says that they have {self.dimension} dimensions: use another')
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.where(norms > 0, norms, 1)  # in float32: bfloat16 has three digits
        is_finite = np.isfinite(vectors).all(axis=1)
        if not is_finite.all():
            text = texts[int(np.argmin(is_finite))]
            raise UserError(f'embedding model {self.name!r} gives a vector with NaN or infinity for {text[:80]!r}: use '
                            f'another, or one whose weights are whole')
        return vectors

    def count_tokens(self, texts):
        """Of each text (n,), with the prompt, before it is cut to what the model reads."""
        tokens = self.model.tokenizer([self.prompt + text for text in texts], truncation=False, verbose=False)
        return np.array([len(ids) for ids in tokens['input_ids']])

    def describe_cut(self, texts):
        """How many of the texts are longer than the model reads, in one line; '' if hardly any is."""
        most = self.model.max_seq_length
        if not texts or most is None or most == float('inf') or not callable(self.model.tokenizer):
            return ''
        share = np.mean(self.count_tokens(texts) > most)
        return '' if share < 0.005 else (
            f'{share:.0%} of the first {len(texts):,} chunks are longer than the {most} tokens that {self.name} reads: '
            f'their ends do not count when they are searched for; use a smaller retrieval_chunk_size, or a model that '
            f'reads more')


def fingerprint(model, prompt):
    """
    16 hex digits of what a SentenceTransformer's vectors depend on: the weights in use, what it makes of a text's
    tokens, the longest text, the prompt, pooling. Not of normalization: we normalize ourselves.
    """
    import torch
    probe = prompt + 'It\'s THE naïve café, 中文 and 42!'
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()  # frozen ones would not be in the graph
    with torch.enable_grad():
        features = model.preprocess([probe])
        ids = features.get('input_ids', torch.zeros(0)).flatten().tolist()
        features = {key: value.to(model.device) if hasattr(value, 'to') else value for key, value in features.items()}
        used = parameters_of(model(features)['sentence_embedding'])
    settings = [(type(module).__name__, module.get_config_dict()) for module in list(model)[1:]
                if type(module).__name__ != 'Normalize']
    network = getattr(getattr(model[0], 'auto_model', None), 'config', None)
    settings += [(name, getattr(network, name, None)) for name in NETWORK]
    digest = hashlib.blake2b(repr([ids, len(prompt), model.max_seq_length, settings]).encode(), digest_size=8)
    parameters = dict(model.named_parameters())
    for key, tensor in sorted(model.state_dict().items()):
        if (parameters[key] in used or not used) if key in parameters else tensor.is_floating_point():
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parameters_of(tensor):
    """The set of the parameters that a tensor was computed from, by its graph."""
    found, seen, nodes = set(), set(), [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, 'variable'):
            found.add(node.variable)
        nodes += [following for following, _ in node.next_functions]
    return found


def is_cached(name, filename):
    """Whether the hub's cache has a file of a model."""
    from huggingface_hub import try_to_load_from_cache
    try:
        return isinstance(try_to_load_from_cache(name, filename), str)
    except ValueError:  # no name of the hub
        return False


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
