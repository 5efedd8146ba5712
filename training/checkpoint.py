"""
Checkpoints. Each is a folder, whole before the pointer names it, so a run can die at any time:

    out_dir/checkpoints/step-600/model.safetensors   weights, by parameter name
                                 optimizer.pt        AdamW's state, by parameter name; or, of a sharded run,
                                 optimizer/          a file of each rank's shard of it (torch.distributed.checkpoint)
                                 rank-0.pt           per rank: position in the data, random state, losses to log
                                 tokenizer.json      the tokenizer that the model needs
                                 meta.json           step, architecture, settings
    out_dir/checkpoints/latest                       the pointer: the name of the newest whole folder

The .pt files hold tensors and plain values, and are loaded with weights_only=True. The folder optimizer/ has an index
that is loaded through pickle, by a run that resumes, if it is the user's own, and by nothing else. Commands that use a
model take an out_dir, or such a folder wherever it was copied to.
"""
import glob
import itertools
import json
import math
import os
import re
import shutil
import sys
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields

from system import get_rng_state, is_device, pick_device, pick_dtype, quiet_transformers, say

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configurator import (
    UserError,
    load_settings,
    read_overrides,
    reason_of,
    refuse_dry_run,
    sync,
    to_json,
    visible,
    write_atomically,
)
from data.tokenizer import load_tokenizer, token_bytes, vocabulary_hash
from model import RETRO, RETROConfig, gpt2_fields
from retrieval.embedding import quiet
from retrieval.local_server import is_local
from training.checks import NotFinite
from training.distributed import Ranks, has_lost_a_peer
from training.parallel import gather_weights, is_sharded, local, own_parameters

VERSION = 1  # of the layout
LATEST = 'latest'
SHARDS = 'optimizer'  # the folder
RANK_STATE = ('stream', 'rng', 'losses', 'targets')  # fields of RunState in rank-N.pt
COUNTS = {'retrieval_k_neighbors', 'retrieval_pointers'}  # how many there are may change, but not whether
MAY_DIFFER = {'dropout', *COUNTS}  # fields of RETROConfig that may change after training
OF_GPT = ('n_layer', 'n_head', 'n_embd', 'bias', 'block_size', 'token_mix', 'copy_own_context', 'own_context_layers')
GPT2 = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # names of the hub that init_from takes
BEFORE = dict(copy_own_context=False, own_context_layers=[], retrieval_pointers=0)  # of checkpoints without pointers


@dataclass
class RunState:
    """Training state beside model and optimizer, as of the last finished step."""
    step: int = 0
    best_val_loss: float = math.inf
    stream: dict | None = None  # position in the training data
    rng: dict = field(default_factory=get_rng_state)
    losses: list = field(default_factory=list)  # nats of each step since the last line of metrics.jsonl, of all ranks
    targets: int = 0  # tokens that they are of
    saved_steps: list = field(default_factory=list)  # of this run's checkpoints, ascending
    evaluated_at: int | None = None  # step
    is_stepping: bool = False  # in the middle of an optimizer step, whose weights are neither old nor new
    wandb_run_id: str | None = None

    def finish_step(self, nats, targets, stream):
        self.step += 1
        self.losses.append(nats)
        self.targets += targets
        self.stream, self.rng, self.is_stepping = stream, get_rng_state(), False


@dataclass
class Checkpoint:
    """A checkpoint's folder and its meta.json. The large parts are loaded on demand."""
    folder: str
    step: int
    model: dict  # fields of RETROConfig
    settings: dict
    vocabulary_hash: str
    best_val_loss: float
    scaler: dict
    world_size: int
    wandb_run_id: str | None = None

    @property
    def tokenizer_path(self):
        return os.path.join(self.folder, 'tokenizer.json')

    def load_model(self, model):
        """Load the weights into a RETRO. UserError if they are not of its architecture, or not finite."""
        with as_user_error(self.folder):
            weights = load_file(os.path.join(self.folder, 'model.safetensors'))
            weights = {name.removeprefix('model.'): w for name, w in weights.items()}  # of an export
            wanted = dict(model.named_parameters())
            if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in wanted.items()}:
                raise ValueError('its weights are not those of its architecture')
            model.load_state_dict(weights, strict=False)  # the tied lm_head is saved once
        check_finite(model, self.folder)

    def load_optimizer(self, optimizer, scaler, model):
        """
        Load AdamW's moments and the GradScaler, whether the model is sharded or was. Learning rate, betas and weight
        decay stay those of the run.
        """
        with as_user_error(self.folder):
            parameters = own_parameters(model)
            if os.path.isdir(os.path.join(self.folder, SHARDS)):
                states = load_shards(os.path.join(self.folder, SHARDS), parameters)
            else:
                states = torch.load(os.path.join(self.folder, 'optimizer.pt'), map_location='cpu', weights_only=True,
                                    mmap=is_sharded(model))
                if is_sharded(model):
                    states = {name: {key: shard_like(value, parameters[name]) for key, value in state.items()}
                              for name, state in states.items() if name in parameters}
            names = {parameter: name for name, parameter in parameters.items()}
            parameters = itertools.chain(*(group['params'] for group in optimizer.param_groups))
            numbered = {number: states[names[parameter]] for number, parameter in enumerate(parameters)
                        if names[parameter] in states}
            optimizer.load_state_dict(dict(state=numbered, param_groups=optimizer.state_dict()['param_groups']))
            if self.scaler:  # the run that saved it was in float16, too
                scaler.load_state_dict(self.scaler)

    def load_state(self, rank=None):
        """The RunState to resume from on a rank; with None only what all ranks have in common, to evaluate."""
        state = RunState(self.step, self.best_val_loss, saved_steps=[self.step], wandb_run_id=self.wandb_run_id)
        if rank is not None:
            is_new = rank >= self.world_size  # ranks share the position in the data
            with as_user_error(self.folder):
                saved = torch.load(os.path.join(self.folder, f'rank-{0 if is_new else rank}.pt'), weights_only=True)
                for name in RANK_STATE:
                    setattr(state, name, saved[name])
                if 'lanes' in (state.stream or {}):  # those of other ranks may be ours now
                    for path in glob.glob(f'{glob.escape(self.folder)}/rank-*.pt'):
                        state.stream['lanes'] |= torch.load(path, weights_only=True)['stream']['lanes']
            state.rng = None if is_new else state.rng
            state.saved_steps = [step for step in list_steps(os.path.dirname(self.folder)) if step <= self.step]
        return state


def save_checkpoint(settings, ranks, tokenizer, tokenizer_text, model, optimizer, scaler, state):
    """
    Write a checkpoint of the RunState's step, point to it, and remove all but the newest settings.keep_checkpoints.
    All ranks call it, and return when it is complete. A step that has been saved is not saved again. UserError if a
    weight is not finite, or if there is no room.
    """
    if state.step in state.saved_steps:
        return
    check_finite(model, f'the model at step {state.step}', ranks)
    parent = os.path.join(settings.out_dir, 'checkpoints')
    folder = os.path.join(parent, f'step-{state.step}')
    for leftover in glob.glob(f'{glob.escape(parent)}/*.tmp') if ranks.is_master else ():  # of a run that was killed
        with suppress(OSError):
            (shutil.rmtree if os.path.isdir(leftover) else os.unlink)(leftover)
    rank_states = ranks.gather({name: getattr(state, name) for name in RANK_STATE})  # waits for the master, too
    weights = gather_weights(model, ranks)
    states = {name: optimizer.state[p] for name, p in own_parameters(model).items() if p in optimizer.state}
    meta = dict(version=VERSION, step=state.step, model=asdict(model.config), settings=settings.without_secrets(),
                vocabulary_hash=vocabulary_hash(tokenizer), scaler=scaler.state_dict(), world_size=ranks.world_size,
                best_val_loss=state.best_val_loss, wandb_run_id=state.wandb_run_id)
    try:
        if is_sharded(model):
            save_shards(states, f'{folder}.tmp/{SHARDS}', ranks)
        if ranks.is_master:
            os.makedirs(f'{folder}.tmp', exist_ok=is_sharded(model))
            save_file(weights, f'{folder}.tmp/model.safetensors')
            if not is_sharded(model):
                torch.save(states, f'{folder}.tmp/optimizer.pt')
            for rank, rank_state in enumerate(rank_states):
                torch.save(rank_state, f'{folder}.tmp/rank-{rank}.pt')
            write_atomically(tokenizer_text, f'{folder}.tmp/tokenizer.json')
            write_atomically(to_json(meta, indent=1) + '\n', f'{folder}.tmp/meta.json')
            for name in os.listdir(f'{folder}.tmp'):
                sync(f'{folder}.tmp/{name}')
            sync(f'{folder}.tmp')
            shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed before it updated the pointer
            os.replace(f'{folder}.tmp', folder)
            write_atomically(f'step-{state.step}\n', os.path.join(parent, LATEST))  # syncs the folder, too
    except (OSError, RuntimeError, SafetensorError) as error:  # torch has its own for a full disk
        if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) or has_lost_a_peer(error):
            raise
        if not ranks.is_master:  # which has the same error, and says so
            sys.exit(UserError.exit_code)
        shutil.rmtree(f'{folder}.tmp', ignore_errors=True)
        raise UserError(f'the checkpoint of step {state.step} could not be written to {parent} '
                        f'({describe_write_error(error, parent)}): make room there, or name another out_dir; the '
                        f'newest checkpoint is of step {max(state.saved_steps, default="none")}') from error
    if ranks.is_master and settings.keep_checkpoints:
        remove_checkpoints(parent, state.step, keep=[*state.saved_steps, state.step][-settings.keep_checkpoints:])
    ranks.barrier()  # torchrun kills all ranks when one exits
    state.saved_steps.append(state.step)


def describe_write_error(error, folder):
    """An error of writing to a folder, in one line; torch and safetensors do not say that the disk is full."""
    free = shutil.disk_usage(folder).free if os.path.isdir(folder) else 0
    return f'{reason_of(error)}; {free / 1e6:,.0f} MB are free'


def check_finite(model, name, ranks=None):
    """NotFinite on all ranks if a weight is NaN or infinite, in the shard of any of them."""
    parameters = own_parameters(model)
    is_wrong = [not torch.isfinite(local(parameter)).all() for parameter in parameters.values()]
    is_wrong = (ranks or Ranks()).gather_numbers(*is_wrong).any(0).tolist()
    for key in itertools.compress(parameters, is_wrong):
        raise NotFinite(f'{name} has weights that are not finite ({key}): resume from an earlier checkpoint')


class as_one_error:
    """Raise what torch.distributed.checkpoint has gathered of all ranks' exceptions as the first of these."""

    def __enter__(self):
        pass

    def __exit__(self, _, error, __):
        if hasattr(error, 'failures'):
            reason, _ = next(iter(error.failures.values()))
            raise reason from error


def save_shards(states, folder, ranks):
    """Write the optimizer's states {name: {key: DTensor or scalar}}; each rank its own. All raise what one raises."""
    import torch.distributed.checkpoint as dcp
    flat = {f'{name}/{key}': value for name, state in states.items() for key, value in state.items()}
    with as_one_error():
        dcp.save(flat, storage_writer=dcp.FileSystemWriter(folder), process_group=ranks.control)


def load_shards(folder, parameters):
    """What save_shards has written, by any number of ranks, in the shape that the parameters have: a rank's shards."""
    import torch.distributed.checkpoint as dcp
    reader, flat = dcp.FileSystemReader(folder), {}
    for path, saved in reader.read_metadata().state_dict_metadata.items():  # through pickle
        parameter = parameters.get(path.rpartition('/')[0])
        if parameter is not None:
            flat[path] = torch.empty_like(parameter) if saved.size == parameter.shape else torch.empty(saved.size)
    with as_one_error(), warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # that it is not distributed: each rank reads for itself
        dcp.load(flat, storage_reader=reader, no_dist=True)
    states = {}
    for path, value in flat.items():
        name, _, key = path.rpartition('/')
        states.setdefault(name, {})[key] = value.detach()
    return states


def shard_like(whole, parameter):
    """This rank's shard of a tensor, as that of the parameter; what has another shape, such as a count, is kept."""
    from torch.distributed.tensor import distribute_tensor
    if whole.shape != parameter.shape:
        return whole.clone()
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()


def check_owner(folder):
    """UserError if a folder, or what is in it, belongs to another user, who could have written what it runs."""
    for path in (os.path.dirname(folder), folder, *(entry.path for entry in os.scandir(folder))):
        if (owner := os.stat(path).st_uid) != os.geteuid():
            raise UserError(f'{path!r} belongs to user {owner}, and resuming reads it through pickle, which can run '
                            f'code, as user {os.geteuid()}: if you trust it, copy it, or start from its weights alone '
                            f'by --init_from={os.path.dirname(folder)}')


def remove_checkpoints(parent, step, keep):
    """Remove the checkpoints up to a step that are not among those to keep. Later steps have not been reached again."""
    for old in list_steps(parent):
        if old <= step and old not in keep:
            folder = os.path.join(parent, f'step-{old}')
            try:
                os.replace(folder, f'{folder}.tmp')  # a folder without .tmp is always whole
                shutil.rmtree(f'{folder}.tmp')
            except OSError as error:  # the new checkpoint is complete: no reason to end the run
                say(f'could not remove the old checkpoint {folder} ({error})')


def list_steps(parent):
    """The steps of the checkpoints in a folder, ascending."""
    found = [re.fullmatch(r'step-(\d+)', name) for name in os.listdir(parent)]
    return sorted(int(match.group(1)) for match in found if match)


def find_checkpoint(out_dir, for_resume=False):
    """
    The folder of the newest checkpoint in out_dir, or, unless for_resume, out_dir if it is one itself. UserError if
    there is none.
    """
    if os.path.isfile(os.path.join(out_dir, 'meta.json')):
        if for_resume:
            raise UserError(f'out_dir {out_dir!r} is the folder of a checkpoint, and a run resumes in the out_dir that '
                            f'holds checkpoints/: name that one')
        return out_dir
    pointer = os.path.join(out_dir, 'checkpoints', LATEST)
    if not os.path.isfile(pointer):
        if os.path.isfile(os.path.join(out_dir, 'ckpt.pt')):
            raise UserError(f'{os.path.join(out_dir, "ckpt.pt")!r} is a checkpoint of an earlier version of nanoRETRO, '
                            f'which this one cannot read: train again, or use the version that made it')
        raise UserError(f'no checkpoint in {out_dir!r}: train first, or name the out_dir of a trained run')
    with open(pointer, encoding='utf-8', errors='replace') as file:
        name = file.read().strip()
    folder = os.path.join(out_dir, 'checkpoints', name)
    if not re.fullmatch(r'step-\d+', name) or not os.path.isfile(os.path.join(folder, 'meta.json')):
        raise UserError(f'{pointer!r} names {name!r}, which is no checkpoint: write the name of another folder beside '
                        f'it into that file; there are steps {list_steps(os.path.dirname(pointer))}')
    return folder


def load_checkpoint(out_dir, for_resume=False):
    """The Checkpoint that find_checkpoint finds. UserError if there is none, or if it is something else."""
    folder = find_checkpoint(out_dir, for_resume)
    if for_resume and os.path.isdir(os.path.join(folder, SHARDS)):
        check_owner(os.path.join(folder, SHARDS))
    with as_user_error(folder):
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
            meta = json.load(file)
        if meta.pop('version') != VERSION:
            raise ValueError('its layout is of another version')
        if meta['best_val_loss'] is None:
            meta['best_val_loss'] = math.inf
        meta['model'], meta['settings'] = BEFORE | meta['model'], BEFORE | meta['settings']
        RETROConfig(**meta['model'])
        load_settings([], given=meta['settings'])
        return Checkpoint(folder, **meta)


class as_user_error:
    """Turn whatever a damaged or foreign checkpoint raises into a UserError."""

    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        pass

    def __exit__(self, _, error, __):
        of_machine = (UserError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
        if isinstance(error, Exception) and not isinstance(error, of_machine):
            raise UserError(f'checkpoint {self.folder!r} cannot be read ({reason_of(error, 300)}): '
                            f'it is damaged, or of something else; name another out_dir, or the folder of an earlier '
                            f'checkpoint') from error


def check_fits(checkpoint, config, tokenizer):
    """UserError if a run of this RETROConfig and tokenizer cannot use the Checkpoint."""
    saved = checkpoint.model | {'vocabulary': checkpoint.vocabulary_hash}
    wanted = asdict(config) | {'vocabulary': vocabulary_hash(tokenizer)}
    differing = [f'{key}: it has {saved.get(key)!r}, the run {wanted[key]!r}' for key in wanted
                 if (key not in MAY_DIFFER and saved.get(key) != wanted[key])
                 or (key in COUNTS and bool(saved.get(key)) != bool(wanted[key]))]
    if differing:
        raise UserError(f'the checkpoint {checkpoint.folder!r} is of another architecture ({"; ".join(differing)}): '
                        f'use the settings that made it, or start another out_dir')


def describe_resume(checkpoint, settings, world_size):
    """In lines, how a run that resumes is read, if a user should know, and what it does not continue exactly."""
    shards = os.path.join(checkpoint.folder, SHARDS)
    lines = [f'{shards} is read through pickle, which can run code: resume only from folders that you trust'
             if os.path.isdir(shards) else '', describe_changes(checkpoint, settings, world_size)]
    return '\n'.join(filter(None, lines))


def describe_changes(checkpoint, settings, world_size):
    """What a run that resumes with other processes or batches does not continue exactly, in one line, or ''."""
    old = load_settings([], given=checkpoint.settings)
    sizes = [run.batch_size * run.gradient_accumulation_steps for run in (old, settings)]
    for name, part in (('retrofit', 'decoder'), ('freeze_retrieval', 'part of retrieval')):
        if getattr(old, name) != getattr(settings, name):
            effect = ('stays as it is' if getattr(settings, name) else
                      'is trained, too, from here on, with new optimizer state')
            return f'{name} is {getattr(settings, name)}, and was {getattr(old, name)}: the {part} {effect}'
    if sizes[0] != sizes[1]:
        return (f'a step has {sizes[1]} sequences, and had {sizes[0]}: the documents go on where they were; losses, '
                f'learning rate, and the tokens in metrics.jsonl are of steps of the new size')
    if world_size != checkpoint.world_size or old.batch_size != settings.batch_size:
        return (f'resuming on {world_size} processes with batch_size {settings.batch_size}, after '
                f'{checkpoint.world_size} with {old.batch_size}: the documents go on where they were; losses are the '
                f'same to rounding, or, with dropout, to other random numbers')
    return ''


def is_gpt2(name):
    """Whether init_from names a GPT-2: a folder that transformers saved, or one of the hub, unless it is a folder."""
    if os.path.isfile(os.path.join(name, 'config.json')):
        return load_export(name) is None
    return name in GPT2 and not os.path.isdir(name)


@contextmanager
def gpt2_errors(name):
    """Turn whatever transformers, and what it loads with, raise of a GPT-2 into a UserError of init_from."""
    quiet_transformers()  # what they would report is an error here
    try:
        with quiet('huggingface_hub'):
            yield
    except Exception as error:  # of many unrelated classes
        reason = ' '.join(str(error).split())[:500]
        if isinstance(error, OSError) and not os.path.isdir(name):
            if os.environ.get('HF_HUB_OFFLINE') == '1':
                raise UserError(f'init_from {name!r} could not be downloaded: neither a dry run nor HF_HUB_OFFLINE=1 '
                                f"lets anything be; put config.json and model.safetensors of the hub's "
                                f'openai-community/{name} into a folder, and set init_from to it') from error
            raise UserError(f'init_from {name!r} could not be downloaded ({type(error).__name__}: {reason[:100]}...): '
                            f"connect once, or put config.json and model.safetensors of the hub's "
                            f'openai-community/{name} into a folder, and set init_from to it') from error
        raise UserError(f'init_from {name!r} cannot be used: {reason}') from error


def gpt2_settings(name):
    """The settings that follow from a GPT-2 of transformers, as a dict. UserError if there is none."""
    with gpt2_errors(name):
        fields = gpt2_fields(name)
        RETROConfig(**fields, use_retrieval=False)  # validates them
    path = os.path.join(name, 'tokenizer.json')
    is_other = fields['vocab_size'] != 50257 and os.path.isfile(path)
    return fields | dict(tokenizer=path if is_other else 'gpt2')


def find_source(settings):
    """The Checkpoint that a run starts from or resumes; None if it is a GPT-2. UserError if there is no such model."""
    source = settings.init_from
    if source in ('scratch', 'resume') or settings.eval_only:
        return load_checkpoint(settings.out_dir, for_resume=not settings.eval_only)
    if is_gpt2(source):
        return None
    if not os.path.isdir(source):
        raise UserError(f"init_from {source!r} is neither 'scratch' nor 'resume' nor a folder nor one of {GPT2}")
    return load_export(source) or load_checkpoint(source)


def source_settings(settings):
    """
    What a run takes from the model that it starts from or resumes, where its config says nothing, as a dict: the
    architecture and the tokenizer. UserError if there is no such model.
    """
    source, checkpoint = settings.init_from, find_source(settings)
    if checkpoint is None:
        return gpt2_settings(source)
    if source in ('scratch', 'resume') or settings.eval_only:
        tokenizer = checkpoint.settings['tokenizer']
        is_there = tokenizer == 'gpt2' or os.path.isfile(tokenizer)  # it may be of a run that has gone on or is gone
        return checkpoint.model | dict(tokenizer=tokenizer if is_there else checkpoint.tokenizer_path)
    keys = checkpoint.model if checkpoint.model['use_retrieval'] else OF_GPT
    return {key: checkpoint.model[key] for key in keys} | dict(tokenizer=checkpoint.tokenizer_path)


def load_weights(source, config, tokenizer, retrofit=False):
    """
    A RETRO of this RETROConfig that starts from the weights of init_from: a GPT-2 that transformers saved, here or on
    the hub, whose code, if any, is not run; or an out_dir or checkpoint of ours. A GPT that becomes a RETRO is still
    that GPT, exactly, until it is trained. UserError if they do not fit; with retrofit also if more is new than
    retrieval.
    """
    if is_gpt2(source):
        has = dict(use_retrieval=False, token_mix=False, copy_own_context=False)
        with gpt2_errors(source):
            model = RETRO.from_pretrained(source, **asdict(config))
            path = os.path.join(source, 'tokenizer.json')
            if os.path.isfile(path) and token_bytes(load_tokenizer(path))[:tokenizer.n_vocab] != token_bytes(tokenizer):
                raise ValueError(f'its tokenizer.json is not the tokenizer of this run, {tokenizer.name!r}')
        check_finite(model, source)
    else:
        checkpoint = load_export(source) or load_checkpoint(source)
        has = checkpoint.model
        check_source(source, checkpoint, config, tokenizer)
        trained, model = RETRO(RETROConfig(**has)), RETRO(config)
        checkpoint.load_model(trained)
        model.start_from(dict(trained.named_parameters()))
    if retrofit and has['use_retrieval']:
        raise UserError(f'retrofit adds retrieval to a GPT, and init_from {source!r} is a RETRO already: go on with it '
                        f'by --out_dir={source} --init_from=resume, or start from its weights by --retrofit=False')
    new = [key for key in ('token_mix', 'copy_own_context') if getattr(config, key) and not has[key]]
    if retrofit and new:
        raise UserError(f'retrofit trains what retrieval adds, and {" and ".join(new)}, which init_from {source!r} has '
                        f'not, would be new, too: leave it out, or train all weights by --retrofit=False')
    return model


def check_source(source, checkpoint, config, tokenizer):
    """UserError if a run of this RETROConfig and tokenizer cannot start from the weights of a Checkpoint."""
    if vocabulary_hash(tokenizer) != checkpoint.vocabulary_hash:
        raise UserError(f'init_from {source!r} was trained with another tokenizer than {tokenizer.name!r}: leave '
                        f'tokenizer out, or set it to {checkpoint.tokenizer_path!r}, and use a collection of it')
    if checkpoint.model['use_retrieval']:
        return check_fits(checkpoint, config, tokenizer)
    theirs, ours = checkpoint.model, asdict(config)
    # what a GPT has not may be added, and a block may be cut
    fits = dict(block_size=ours['block_size'] <= theirs['block_size'],
                **{key: ours[key] or not theirs[key] for key in ('token_mix', 'copy_own_context')},
                own_context_layers=ours['own_context_layers'] == theirs['own_context_layers']
                or not theirs['copy_own_context'])
    wrong = [f'{key} is {ours[key]} and that of {source} {theirs[key]}' for key in OF_GPT
             if not fits.get(key, ours[key] == theirs[key])]
    if wrong:
        raise UserError(f'init_from {source!r} does not fit: {"; ".join(wrong)}: leave it out, or use the same')


def load_pretrained(name, overrides=()):
    """
    As load_run, of a GPT-2: 'gpt2', 'gpt2-medium', ..., or a folder that transformers saved. `overrides` may shorten
    its block_size, or name the tokenizer of a folder that has none. UserError if there is no such model.
    """
    if not is_gpt2(name):
        raise UserError(f'init_from {name!r} is none of {GPT2} and no folder in which transformers saved a GPT-2; a '
                        f'model of ours is named by --out_dir')
    settings = load_settings(overrides, given=gpt2_settings(name) | dict(use_retrieval=False))
    if settings.use_retrieval:
        raise UserError(f'{name!r} is a GPT: leave use_retrieval out, or train it with retrieval first (docs/start.md)')
    device = pick_device(settings.device)
    pick_dtype(settings.dtype, device)  # validates it
    tokenizer = load_tokenizer(settings.tokenizer)
    with gpt2_errors(name):
        config = RETROConfig.from_settings(settings, tokenizer.n_vocab)
    model = load_weights(name, config, tokenizer)
    return settings, tokenizer, model.eval().to(device), device


def load_export(folder):
    """
    What export.py, or transformers after it, wrote as a model with its own code, as a Checkpoint of weights alone; None
    if a folder holds no such model. UserError if it is damaged.
    """
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError), open(
            os.path.join(folder, 'config.json'), encoding='utf-8') as file:
        saved = json.load(file)
        if saved['model_type'] == 'nanoretro':
            with as_user_error(folder):
                model = BEFORE | {f.name: saved[f.name] for f in fields(RETROConfig) if f.name in saved}
                RETROConfig(**model)
                tokenizer = load_tokenizer(os.path.join(folder, 'tokenizer.json'))
                return Checkpoint(folder, 0, model, {}, vocabulary_hash(tokenizer), math.inf, {}, 1)
    return None


def load_run(out_dir, overrides=()):
    """
    The Settings, tokenizer, model in evaluation mode and device of a trained run: what sampling and evaluating start
    from. `overrides` (--key=value) change its settings, but not its architecture. A checkpoint may be a stranger's: it
    names no folder to write to, switches nothing on, and a server that it names gets no token, unless the overrides
    name it, too. UserError if there is no such run.
    """
    checkpoint = load_checkpoint(out_dir)
    settings, defaults = load_settings([], given=checkpoint.settings), load_settings([])
    named = read_overrides(overrides, vars(settings))
    refuse_dry_run(named)
    if named.get('retrieval_offline'):
        raise UserError('retrieval_offline is for training: what prompts and other texts read is not precomputed: '
                        'leave it out')
    for key in ('wandb_log', 'retrieval_offline', 'multiple_choice_benchmarks', 'benchmark_data_dir',
                'retrieval_cache_dir', 'retrieval_matches_dir', 'data_cache_dir', 'data_cache_gb'):
        setattr(settings, key, getattr(defaults, key))
    if 'retrieval_milvus_uri' not in named:
        if named.get('retrieval_milvus_token') and not is_local(settings.retrieval_milvus_uri):
            raise UserError(f'retrieval_milvus_token is given, and the checkpoint alone names the server: if '
                            f'{settings.retrieval_milvus_uri} may have it, give --retrieval_milvus_uri, too')
        settings.retrieval_milvus_token = ''
    settings = settings.replace(**named)
    if 'device' not in named and not is_device(settings.device):
        print(visible(f'the run was on {settings.device}, which is not here: using {pick_device("auto")}'),
              file=sys.stderr)
        settings.device = 'auto'
    if 'dtype' not in named and settings.dtype == 'float16' and pick_device(settings.device) == 'cpu':
        settings.dtype = 'auto'
    fixed = (checkpoint.model.keys() | {'tokenizer'}) - MAY_DIFFER
    changed = [key for key in sorted(fixed) if key in checkpoint.settings
               and getattr(settings, key) != checkpoint.settings[key]]
    if changed:
        raise UserError(f'{", ".join(changed)} cannot be changed after training: leave it out')
    for key in COUNTS:
        if getattr(settings, key) and not checkpoint.model[key]:
            raise UserError(f'{key} is {getattr(settings, key)}, and the model was trained with 0, so it reads none: '
                            f'leave it out')
    device = pick_device(settings.device)
    pick_dtype(settings.dtype, device)  # validates it
    with as_user_error(checkpoint.folder):
        tokenizer = load_tokenizer(checkpoint.tokenizer_path)
        if vocabulary_hash(tokenizer) != checkpoint.vocabulary_hash:
            raise ValueError('its tokenizer.json is not the one that it was trained with')
        model = RETRO(RETROConfig(**checkpoint.model))
        checkpoint.load_model(model)
    return settings, tokenizer, model.eval().to(device), device
