"""
How the processes of a run share its model: each has a copy (DDP), or a shard of every weight, gradient and optimizer
state (FSDP2, torch's fully_shard); and activation checkpointing. model.py knows of neither.
"""
import functools
import logging
import warnings

import torch
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from configurator import UserError
from model import RETRO

COMPILED = 32  # variants of a block: with pointers, retrieval or an encoder; training, and evaluating on and off
SAVED = ('aten.mm', 'aten.addmm', 'aten._scaled_dot_product_flash_attention',  # by 'selective'; all else is recomputed
         'aten._scaled_dot_product_flash_attention_for_cpu', 'aten._scaled_dot_product_efficient_attention',
         'aten._scaled_dot_product_cudnn_attention', 'torch_attn._varlen_attn')


def check_parallel(settings, ranks, precision):
    """UserError if the setting `parallel` does not fit a run of these Ranks."""
    if settings.parallel == 'fsdp' and ranks.world_size == 1:
        raise UserError("parallel 'fsdp' shards the model over processes, and this is one process: start several with "
                        "torchrun, or leave parallel at 'ddp'")
    if settings.parallel == 'fsdp' and precision == 'float16':
        raise UserError("parallel 'fsdp' trains in 'bfloat16' or 'float32', and dtype is 'float16' (which 'auto' is on "
                        "a GPU without bfloat16): set dtype, or parallel to 'ddp'")


def parallelize(model, settings, ranks, precision, is_compiled):
    """A RETRO on its device, as the training loop calls it. Sharded, its parameters are DTensors from here on."""
    if settings.activation_checkpointing != 'none':
        checkpoint_blocks(model, settings.activation_checkpointing)
    if settings.parallel == 'fsdp':
        if is_compiled:  # block by block: the weights arrive between them
            for block in model.transformer.h:
                block.forward = torch.compile(block.forward, recompile_limit=COMPILED)
            model.score = torch.compile(model.score, recompile_limit=COMPILED)  # logits take the most memory
        return shard(model, ranks, precision)
    model.to(ranks.device)
    wrapped = torch.compile(model) if is_compiled else model
    if ranks.world_size > 1:
        wrapped = DDP(wrapped, device_ids=[ranks.device] if ranks.device.startswith('cuda') else None,
                      gradient_as_bucket_view=True)  # else each gradient is there twice
    return wrapped


def checkpoint_blocks(model, which):
    """Have each block keep its inputs alone, and recompute the rest in the backward pass; 'selective' not all of it."""
    options = {}
    if which == 'selective':
        import torch.nn.attention.varlen  # registers its operator
        spaces = [name.split('.') for name in SAVED]
        saved = [getattr(getattr(torch.ops, space), name).default for space, name in spaces]
        # which warns of operations in place: those of the blocks are on tensors that are recomputed
        logging.getLogger('torch._higher_order_ops.wrap').setLevel(logging.ERROR)
        options = dict(context_fn=functools.partial(create_selective_checkpoint_contexts, saved))
    for block in model.transformer.h:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)


def shard(model, ranks, precision):
    """
    Shard a RETRO that is on the CPU. Each block is a unit, whose weights are gathered for its forward and its backward
    pass, in the precision to compute in. The rest is one more, gathered in float32 for the whole step, as it is needed
    at both ends: the tied embedding and head, read directly, too, positions, the last norm, token mix and mixture.
    Gradients are reduced in float32, and divided by the number of ranks, as DDP does.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(ranks.device.split(':')[0], (ranks.world_size,))
    policy = MixedPrecisionPolicy(torch.bfloat16 if precision == 'bfloat16' else None, torch.float32,
                                  cast_forward_inputs=False)
    # that neighbors pass through blocks as views, which nothing changes in place
    warnings.filterwarnings('ignore', 'FSDP2-wrapped module', UserWarning)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))


def is_sharded(model):
    return hasattr(model, 'reshard')  # of FSDPModule, whose import takes seconds


def reduce_gradients(model, is_last):
    """
    Say, before a micro-step, whether its backward pass is the step's last one: DDP reduces gradients in that one only,
    FSDP in every one, as a rank has no room for whole gradients.
    """
    if isinstance(model, DDP):
        model.require_backward_grad_sync = is_last


def clip_gradients(model, most):
    """Scale the gradients to a norm of at most `most`, over all shards. The norm before, as a tensor."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return norm.full_tensor() if is_sharded(model) else norm


def own_parameters(model):
    """{name: parameter}, of a sharded model this rank's shards, as DTensors."""
    if is_sharded(model):
        model.reshard()  # an evaluation leaves the last unit whole
    return dict(model.named_parameters())


def local(tensor):
    """What this rank has of a tensor."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


@torch.no_grad()
def gather_weights(model, ranks):
    """
    {name: whole tensor} on the master, on the CPU if they were sharded; {} on other ranks, which take part. One weight
    at a time is whole on the devices.
    """
    weights = {}
    for name, parameter in own_parameters(model).items():
        whole = parameter.full_tensor() if is_sharded(model) else parameter.detach()
        if ranks.is_master:
            weights[name] = whole.cpu() if is_sharded(model) else whole
    return weights


def whole_model(model, ranks):
    """The RETRO itself, or, if it is sharded, on the master a whole copy on its device; all ranks take part."""
    if not is_sharded(model):
        return model
    weights = gather_weights(model, ranks)
    if not ranks.is_master:
        return model
    with torch.device('meta'):  # draws no random numbers
        copy = RETRO(model.config)
    copy.load_state_dict({name: w.to(ranks.device) for name, w in weights.items()}, strict=False, assign=True)
    copy.lm_head.weight = copy.transformer.wte.weight
    return copy
