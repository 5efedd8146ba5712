"""
What can be wrong with a run beside its single settings: settings that contradict each other, and values that are not
finite.
"""
import json
import math

from configurator import UserError


class NotFinite(UserError):
    """A loss, a gradient or a weight is NaN or infinite."""
    exit_code = 4


def check_settings(settings):
    """The settings, with those that follow others filled in. UserError if they contradict each other."""
    settings = settings.replace(lr_decay_iters=settings.lr_decay_iters or settings.max_iters,
                                min_lr=settings.learning_rate / 10 if settings.min_lr < 0 else settings.min_lr)
    if settings.block_size % settings.retrieval_chunk_size:  # the data is on the chunk grid without retrieval, too
        raise UserError(f'block_size {settings.block_size} must be a multiple of retrieval_chunk_size '
                        f'{settings.retrieval_chunk_size}: correct the config')
    if settings.decay_lr and settings.min_lr > settings.learning_rate:
        raise UserError(f'min_lr {settings.min_lr} is above learning_rate {settings.learning_rate}: lower it, or leave '
                        f'it at -1.0, which is a tenth of learning_rate')
    if settings.retrieval_rerank and settings.retrieval_rerank < settings.retrieval_k_neighbors:
        raise UserError(f'retrieval_rerank {settings.retrieval_rerank} must be at least retrieval_k_neighbors '
                        f'{settings.retrieval_k_neighbors}, or 0')
    for key, value in settings.without_secrets().items():  # checkpoints hold them
        try:
            json.dumps(value)
        except TypeError as error:
            raise UserError(f'{key} holds a value that cannot be saved ({error}): use plain values') from error
    return settings


def not_finite(step, **values):
    """A NotFinite error if one of the values is NaN or infinite, else None."""
    wrong = [f'{name} is {value}' for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        return NotFinite(f'{", ".join(wrong)} at step {step}: lower learning_rate, or raise warmup_iters')
    return None
