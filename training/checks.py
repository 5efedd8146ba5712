"""
What can be wrong with a run beside its single settings: settings that contradict each other, and values that are not
finite.
"""
import json
import math

from configurator import UserError
from data.conversations import find_template
from data.documents import as_dataset_configs, check_sides

MIN_CHUNKS = 64  # to judge by
OF_TRAINING = {'continued', 'found_themselves'}  # counts that are not of the val text


class NotFinite(UserError):
    """A loss, a gradient or a weight is NaN or infinite."""
    exit_code = 4


def check_settings(settings):
    """The settings, with those that follow others filled in. UserError if they contradict each other."""
    if -1.0 < settings.min_lr < 0.0:
        raise UserError(f'min_lr must be at least 0.0, or -1.0 for learning_rate / 10, but is {settings.min_lr}')
    settings = settings.replace(lr_decay_iters=settings.lr_decay_iters or settings.max_iters,
                                min_lr=settings.learning_rate / 10 if settings.min_lr < 0 else settings.min_lr)
    if settings.block_size % settings.retrieval_chunk_size:  # the data is on the chunk grid without retrieval, too
        raise UserError(f'block_size {settings.block_size} must be a multiple of retrieval_chunk_size '
                        f'{settings.retrieval_chunk_size}: correct the config')
    if settings.decay_lr and settings.min_lr > settings.learning_rate:
        raise UserError(f'min_lr {settings.min_lr} is above learning_rate {settings.learning_rate}: lower it, or leave '
                        f'it at -1.0, which is a tenth of learning_rate')
    if settings.decay_lr and settings.lr_decay_iters <= settings.warmup_iters < settings.max_iters:
        raise UserError(f'warmup_iters {settings.warmup_iters} must be below lr_decay_iters {settings.lr_decay_iters}: '
                        f'the learning rate would fall from its peak at once; lower it, or leave lr_decay_iters at 0, '
                        f'which is max_iters')
    if settings.eval_only and settings.init_from not in ('scratch', 'resume'):
        raise UserError(f'eval_only evaluates the checkpoint in out_dir {settings.out_dir!r}, and init_from names '
                        f'{settings.init_from!r}: leave one of them out, or pass --init_from=resume')
    if settings.retrofit and not settings.use_retrieval:
        raise UserError('retrofit trains what retrieval adds, and use_retrieval is False: set it to True, or retrofit '
                        'to False')
    if settings.retrofit and settings.init_from == 'scratch' and not settings.eval_only:
        raise UserError("retrofit adds retrieval to a trained GPT, and init_from is 'scratch': name the GPT by "
                        "init_from, e.g. --init_from=gpt2, or an out_dir")
    if 0 < settings.retrieval_rerank < settings.retrieval_k_neighbors:
        raise UserError(f'retrieval_rerank {settings.retrieval_rerank} must be at least retrieval_k_neighbors '
                        f'{settings.retrieval_k_neighbors}, or 0')
    finds_passages = settings.passages and settings.passages_from == 'collection'
    if settings.use_retrieval and not settings.retrieval_k_neighbors and settings.retrieval_mode != 'dense' \
            and not finds_passages:
        raise UserError(f'retrieval_mode {settings.retrieval_mode!r} says how neighbors are found, and '
                        f"retrieval_k_neighbors is 0: set it to a number of neighbors, or retrieval_mode to 'dense'")
    if settings.use_retrieval and not settings.retrieval_k_neighbors and not settings.retrieval_pointers:
        raise UserError('use_retrieval is True, but retrieval_k_neighbors and retrieval_pointers are both 0: set one '
                        'of them, or use_retrieval to False')
    if settings.train_datasets and settings.val_datasets and not settings.eval_only:
        check_sides(*(as_dataset_configs(getattr(settings, name), name) for name in ('train_datasets', 'val_datasets')))
    if settings.retrieval_offline and not settings.use_retrieval:
        raise UserError('retrieval_offline is True, but a GPT reads no neighbors: leave it out, or set use_retrieval')
    if settings.retrieval_offline and settings.train_datasets and not settings.eval_only and (
            streamed := [config.path for config in as_dataset_configs(settings.train_datasets, 'train_datasets')
                         if config.streaming]):
        raise UserError(f'retrieval_offline reads what was precomputed, and of {streamed[0]!r}, which is streamed, '
                        f'nothing can be: set its streaming=False, or leave one of them out')
    if settings.retrieval_offline and settings.multiple_choice_benchmarks:
        raise UserError('retrieval_offline reads what was precomputed alone, and multiple_choice_benchmarks ask the '
                        'database: leave one of them out')
    for key, known in (('parallel', ('ddp', 'fsdp')), ('activation_checkpointing', ('none', 'full', 'selective'))):
        if getattr(settings, key) not in known:
            raise UserError(f'{key} {getattr(settings, key)!r} is none of {str(known)[1:-1]}')
    if settings.activation_checkpointing != 'none' and settings.retrofit and not settings.retrieval_k_neighbors:
        raise UserError(f'retrofit of pointers alone keeps no activations, and activation_checkpointing is '
                        f"{settings.activation_checkpointing!r}, which would do nothing: leave it at 'none'")
    if settings.dry_run and settings.eval_only:
        raise UserError('a dry run sizes a training, and eval_only trains nothing: leave out one of the two')
    check_tuning(settings)
    for key, value in settings.without_secrets().items():  # checkpoints hold them
        try:
            json.dumps(value)
        except TypeError as error:
            raise UserError(f'{key} holds a value that cannot be saved ({error}): use plain values') from error
    return settings


def check_tuning(settings):
    """UserError if the settings of instruction tuning contradict each other, or the run's others."""
    for name, choices in (('passages', ('', 'prompt', 'neighbors')), ('passages_from', ('file', 'collection'))):
        if getattr(settings, name) not in choices:
            raise UserError(f'{name} is {getattr(settings, name)!r}: choose one of {", ".join(map(repr, choices))}')
    if not settings.template:
        for name in ('passages', 'freeze_retrieval'):
            if getattr(settings, name):
                raise UserError(f'{name} is {getattr(settings, name)!r}, which is of instruction tuning: leave it out, '
                                f'or set template and run python sft.py')
        return
    find_template(settings.template)
    if settings.passages_from == 'collection' and not settings.passages:
        raise UserError("passages_from is 'collection', and passages is '', which gives none: set passages to 'prompt' "
                        "or 'neighbors', or leave passages_from out")
    if settings.retrieval_offline:
        raise UserError('retrieval_offline is True, and nothing is precomputed of conversations: leave it out')
    if settings.freeze_retrieval and (settings.retrofit or not settings.use_retrieval):
        other = 'retrofit, which trains nothing else' if settings.retrofit else 'a GPT, which has none'
        raise UserError(f'freeze_retrieval leaves what retrieval adds as it is, and the run is of {other}: leave out '
                        f'one of the two')
    if settings.passages != 'neighbors':
        return
    if settings.freeze_retrieval or not settings.use_retrieval:
        name = 'freeze_retrieval is True' if settings.freeze_retrieval else 'use_retrieval is False'
        raise UserError(f"passages is 'neighbors', and {name}, so nothing reads them: set passages to 'prompt'")
    if 0 < settings.retrieval_k_neighbors < settings.num_passages:
        raise UserError(f"passages is 'neighbors', of which the model reads {settings.retrieval_k_neighbors} "
                        f"(retrieval_k_neighbors), and num_passages is {settings.num_passages}: lower it")


def describe_schedule(settings):
    """What a reader of the settings may not expect of the learning rate, in one line, or ''."""
    if not settings.decay_lr:
        return ''
    if settings.max_iters <= settings.warmup_iters:
        return (f'the learning rate never reaches its peak: max_iters {settings.max_iters} is not above warmup_iters '
                f'{settings.warmup_iters}')
    if settings.max_iters < settings.lr_decay_iters:
        return (f'the run ends before the learning rate has decayed: max_iters {settings.max_iters} is below '
                f'lr_decay_iters {settings.lr_decay_iters}')
    return ''


class FoundThemselves(UserError):
    """Most chunks are handed themselves as neighbors."""


def check_found_themselves(counts, warn):
    """
    A FoundThemselves error if most of the chunks that retrieval counted (retriever.py) were handed themselves and their
    continuation: the loss would measure copying. Calls `warn` above a tenth, more than license headers explain.
    The counts are cleared when they were enough to judge by.
    """
    continued, found = counts.get('continued', 0), counts.get('found_themselves', 0)
    if continued < MIN_CHUNKS:
        return None
    counts.clear()
    todo = ('their documents stand in the collection under another id, or more than once; fill it from the same '
            'train_datasets with python -m retrieval.populate CONFIG --sync=True, with the same id_field and source, '
            'and remove copies')
    if found > 0.5 * continued:
        return FoundThemselves(f'{found:,} of {continued:,} chunks were handed themselves and their continuation as a '
                               f'neighbor, which the model would learn to copy: {todo}')
    if found > 0.1 * continued:
        warn(f'more than a tenth of the chunks were handed themselves and their continuation as a neighbor '
             f'(chunks_found_themselves in metrics.jsonl): {todo}')
    return None


def check_step(step, loss, norm, scaler):
    """
    A NotFinite error if a step's loss or gradient norm is not finite, else None. In float16 gradients overflow now and
    then: the GradScaler skips the step and halves its scale. They are an error when that no longer helps.
    """
    if scaler.is_enabled() and math.isfinite(loss):
        return None if math.isfinite(norm) or scaler.get_scale() >= 1.0 else NotFinite(
            f'the gradients at step {step} are not finite at any loss scale: lower learning_rate, or use '
            f"dtype='bfloat16' or 'float32'")
    return not_finite(step, loss=loss, norm=norm)


def not_finite(step, **values):
    """A NotFinite error if one of the values is NaN or infinite, else None."""
    wrong = [f'{name} is {value}' for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        return NotFinite(f'{", ".join(wrong)} at step {step}: lower learning_rate, or raise warmup_iters')
    return None
