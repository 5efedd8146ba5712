"""
RETRO (Borgeaud et al. 2022, arXiv 2112.04426) in one file: a GPT-2 decoder, some of whose blocks also attend, chunk by
chunk, to retrieved neighbors. With use_retrieval = False it is nanoGPT's GPT. Options go beyond the paper: pointers
(retrieval_pointers), tokens that came next in the knowledge base where the longest runs of the last tokens stand, and
the same of the sequence's own context (copy_own_context); cross-attention that can copy from its first step on
(retrieval_copy); a token mix (token_mix).

Shapes: B sequences of T tokens, L = T / C chunks of C tokens, K neighbors a chunk, each of R = 2C tokens (a chunk and
its continuation), P pointers a token, D = n_embd, d = D / heads. N = B * L chunks and M = K * R neighbor tokens are
flattened dimensions.
"""
import math
import re
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F

COPY_HEADS = 2  # of CopyAttention; more are no better, and each costs a pass over the scores
POINTER_HEADS = 2  # of OwnContext
LONGEST = 16  # tokens that a pointer's match counts at most
OCTAVE = 8  # a pointer's share is given as -OCTAVE * log2(share), rounded
SHARES = 32  # buckets of shares, of half an octave each
OWN_POINTERS = 8  # of a token's own context
OWN_LENGTHS = (1, 2, 3, 4, 6, 8)  # of the runs that are looked for in it, in tokens
OWN_PLACES = 3  # of each, the most recent
HASHES = [pow(6364136223846793005, n + 1, 2**63) for n in range(LONGEST + 1)]  # odd factors of a run's tokens
GROWTH = 0.7  # a place counts e^GROWTH times as much as one whose match is a token shorter
SILENT = 1.0  # the score at first of a trained decoder that pointers are added to
RETRIEVES = r'mixture\.|transformer\.h\.\d+\.(cca|encoder)\.'  # names of the parameters that retrieval adds
GPT2_FIELDS = ('model_type', 'activation_function', 'tie_word_embeddings', 'layer_norm_epsilon', 'scale_attn_weights',
               'scale_attn_by_inverse_layer_idx', 'reorder_and_upcast_attn', 'add_cross_attention', 'n_inner')


@dataclass
class RETROConfig:
    """The architecture. Defaults and meanings are those of the settings in train.py. ValueError if they contradict."""
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    token_mix: bool = True
    copy_own_context: bool = True
    own_context_layers: list = field(default_factory=list)
    use_retrieval: bool = True
    retrieval_pointers: int = 32  # P
    retrieval_layers: list = field(default_factory=list)
    retrieval_chunk_size: int = 64  # C
    retrieval_k_neighbors: int = 2  # K
    retrieval_encoder_layers: int = 0
    retrieval_copy: bool = True
    retrieval_longest_match: int = 6

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} must be a multiple of n_head {self.n_head}')
        if self.copy_own_context:
            if self.n_embd % POINTER_HEADS:
                raise ValueError(f'n_embd {self.n_embd} must be a multiple of {POINTER_HEADS} for copy_own_context')
            self.own_context_layers = self.own_context_layers or sorted({1, self.n_layer // 2 + 1})
            check_layers('own_context_layers', self.own_context_layers, self.n_layer)
        if not self.has_neighbors:
            return
        if self.retrieval_chunk_size < 1 or self.block_size % self.retrieval_chunk_size:
            raise ValueError(f'block_size {self.block_size} must be a multiple of retrieval_chunk_size '
                             f'{self.retrieval_chunk_size}')
        if self.retrieval_copy and self.n_embd % COPY_HEADS:
            raise ValueError(f'n_embd {self.n_embd} must be a multiple of {COPY_HEADS} for retrieval_copy')
        if not self.retrieval_layers:  # every third from the 6th, or 9th in deep models, and the last (section 2.4)
            first = 9 if self.n_layer > 15 else 6
            self.retrieval_layers = sorted({*range(first, self.n_layer + 1, 3), self.n_layer})
        check_layers('retrieval_layers', self.retrieval_layers, self.n_layer)
        if not 0 <= self.retrieval_longest_match <= 127:  # matches are counted in int8
            raise ValueError(f'retrieval_longest_match {self.retrieval_longest_match} is not from 0 to 127')

    @classmethod
    def from_settings(cls, settings, vocab_size):
        """The architecture of a run's settings; vocab_size is padded to a multiple of 64, which is faster."""
        given = {f.name: getattr(settings, f.name) for f in fields(cls) if f.name != 'vocab_size'}
        return cls(vocab_size=-(-vocab_size // 64) * 64, **given)

    @property
    def has_neighbors(self):
        return self.use_retrieval and self.retrieval_k_neighbors > 0

    @property
    def has_pointers(self):
        return self.use_retrieval and self.retrieval_pointers > 0

    @property
    def has_encoder(self):
        """Only copying can do without an encoder; one of 0 blocks adds positions and a layer norm."""
        return self.has_neighbors and (self.retrieval_encoder_layers > 0 or not self.retrieval_copy)


def check_layers(name, layers, n_layer):
    wrong = [p for p in layers if not (isinstance(p, int) and 1 <= p <= n_layer)]
    if wrong:
        raise ValueError(f'{name} {layers} must be numbers from 1 to n_layer {n_layer}, but {wrong} are not')


def gpt2_fields(name):
    """Fields of RETROConfig that a GPT-2 of transformers, a name or a folder, has. ValueError if it is no plain one."""
    from transformers import AutoConfig, GPT2Config
    c = AutoConfig.from_pretrained(name, trust_remote_code=False)
    plain = GPT2Config(n_inner=getattr(c, 'n_inner', None) and 4 * c.n_embd)
    odd = [f'{key} is {value!r}' for key in GPT2_FIELDS if (value := getattr(c, key, None)) != getattr(plain, key)]
    if odd:
        raise ValueError(f'{name} is not a plain GPT-2: {", ".join(odd)}')
    return dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, bias=getattr(c, 'bias', True),
                block_size=c.n_positions, vocab_size=c.vocab_size, token_mix=False, copy_own_context=False)


@torch.compiler.assume_constant_result
def takes_documents(device_type, dtype, head_size):
    """Whether flash attention's kernels for packed documents run here: in half precision, on NVIDIA's since A100."""
    return (device_type == 'cuda' and torch.version.hip is None and dtype in (torch.float16, torch.bfloat16)
            and head_size % 8 == 0 and head_size <= 256 and torch.backends.cuda.is_flash_attention_available()
            and torch.cuda.get_device_capability() >= (8, 0))


def document_starts(doc_ids, chunk_size):
    """Where documents start in the B * T tokens, by doc_ids (B, L); then B * T, which also pads: (B * L + 1,) int32."""
    is_start = F.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True).flatten()
    chunks = torch.arange(len(is_start), dtype=torch.int32, device=doc_ids.device)
    starts = chunks.masked_fill(~is_start, len(is_start)).sort().values
    return F.pad(starts, (0, 1), value=len(is_start)) * chunk_size


def attend(q, k, v, mask=None, causal=False, dropout=0.0):
    """
    Attention of q (N, heads, S, d) over k, v (N, heads, M, d). mask broadcasts to (N, heads, S, M): True attends; or it
    is from document_starts: causal within each document.
    """
    if mask is not None and mask.dtype == torch.int32:
        from torch.nn.attention.varlen import varlen_attn  # whose import takes seconds
        y = varlen_attn(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), mask, mask,  # (N * S, heads, d)
                        q.shape[2], q.shape[2], window_size=(-1, 0))  # causal
        return y.unflatten(0, (len(q), -1)).transpose(1, 2)
    if q.device.type != 'cpu' or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    # for short sequences in bfloat16 on a CPU, plain products are several times faster than torch's fused kernel
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # (N, heads, S, M)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:  # an addition costs nothing in the backward pass
        scores += torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


def split_heads(x, n_head):
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)  # (N, S, D) -> (N, heads, S, d)


def join_heads(x):
    return x.transpose(1, 2).flatten(2)  # (N, heads, S, d) -> (N, S, D)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        """In float32, where x is, also if the weights come in half precision, as they do sharded."""
        dtype = torch.promote_types(self.weight.dtype, x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(dtype), bias, self.eps)


class SelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, mask=None, causal=False):
        """x (N, S, D); mask and causal are those of attend."""
        q, k, v = (split_heads(y, self.n_head) for y in self.c_attn(x).chunk(3, dim=-1))
        y = attend(q, k, v, mask, causal, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(join_heads(y)))


class CrossAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_kv = nn.Linear(config.n_embd, 2 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, context, mask=None):
        """x (N, S, D) attends to context (N, M, D); mask broadcasts to (N, heads, S, M): True attends."""
        return self.read(x, *self.keys_values(context), mask)

    def keys_values(self, context):
        return [split_heads(y, self.n_head) for y in self.c_kv(context).chunk(2, dim=-1)]

    def read(self, x, k, v, mask=None):
        y = attend(split_heads(self.c_q(x), self.n_head), k, v, mask, dropout=self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(join_heads(y)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh')  # as in GPT-2
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class NeighborContext(NamedTuple):
    """Inputs of the retrieval blocks. With an encoder, the first of these blocks computes `keys`."""
    found: torch.Tensor  # (B, L) the chunk has a neighbor
    mask: torch.Tensor  # (N, K, R) there is a token
    embeddings: torch.Tensor | None  # (N, K, R, D) for the encoder
    keys: torch.Tensor | None  # (N, M, D); to copy from (N, heads, M, d + 2)
    values: torch.Tensor | None  # to copy from: (N, heads, M, d)
    matches: torch.Tensor | None  # to copy from: (N, C, M)
    is_chunk: torch.Tensor | None = None  # for an encoder: (N, C) the chunk has a token there; None: everywhere


class EncoderBlock(nn.Module):
    """A bidirectional block over a neighbor. The first one also attends to the chunk that retrieved it."""

    def __init__(self, config, attends_to_chunk):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config)
        if attends_to_chunk:
            self.ln_cross = LayerNorm(config.n_embd, bias=config.bias)
            self.ln_chunk = LayerNorm(config.n_embd, bias=config.bias)
            self.cross = CrossAttention(config)
        self.attends_to_chunk = attends_to_chunk
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask, chunks, is_chunk=None):
        """x (N, K, R, D) and mask (N, K, R) of the neighbors; chunks (N, C, D) that retrieved them, is_chunk (N, C)."""
        N, K, R, D = x.shape
        x = x + self.attn(self.ln_1(x).view(N * K, R, D), mask.view(N * K, 1, 1, R)).view(N, K, R, D)
        if self.attends_to_chunk:
            queries = self.ln_cross(x).view(N, K * R, D)
            chunk_mask = None if is_chunk is None else is_chunk[:, None, None]
            x = x + self.cross(queries, self.ln_chunk(chunks), chunk_mask).view(N, K, R, D)
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """
    Encodes neighbors, conditioned on the chunk that retrieved them (section 2.3; as in the paper's models only the
    first block attends to the chunk). Token embeddings are the decoder's; positions are local to the neighbor.
    """

    def __init__(self, config):
        super().__init__()
        self.wpe = nn.Embedding(2 * config.retrieval_chunk_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([EncoderBlock(config, attends_to_chunk=i == 0)
                                for i in range(config.retrieval_encoder_layers)])
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, embeddings, mask, chunks, is_chunk=None):
        """embeddings (N, K, R, D) and mask (N, K, R) of the neighbors, chunks (N, C, D), to (N, M, D)."""
        x = self.drop(embeddings + self.wpe.weight[:embeddings.shape[2]].float())  # sharded weights may be bfloat16
        mask = mask | ~mask.any(-1, keepdim=True)  # an absent neighbor attends to itself: no softmax over nothing
        for block in self.h:
            x = block(x, mask, chunks, is_chunk)
        return self.ln_f(x).flatten(1, 2)


class CopyAttention(nn.Module):
    """
    Cross-attention that can copy from its first step on. A neighbor token's score has an added learned weight times the
    match length: how many tokens agree going back from the query and from it. Its value is the embedding of the token
    after it, so attention to where the last tokens occur finds what came next. A null key is for attending to nothing.
    """

    def __init__(self, config):
        super().__init__()
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.match = nn.Parameter(torch.linspace(0.5, 3.0, COPY_HEADS))
        self.nothing = nn.Parameter(torch.full((COPY_HEADS,), 4.0))  # the null key's score
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, keys, values, matches):
        """x (N, S, D) attends to keys from copy_keys, values (N, heads, M, d) and matches (N, S, M)."""
        q = split_heads(self.c_q(x), COPY_HEADS)
        N, heads, S, d = q.shape
        # the two added dimensions are multiplied with a key's mask and its null flag
        nothing = self.nothing.to(q.dtype).view(heads, 1, 1).expand(N, heads, S, 1)
        q = torch.cat([q / math.sqrt(d), torch.ones_like(nothing), nothing], dim=-1)
        # expanded over N: the gradient is then a sum over contiguous memory, several times faster on a CPU
        weight = self.match.to(q.dtype).expand(N, heads)[..., None, None]
        scores = torch.addcmul(q @ keys.transpose(-2, -1), weight, matches[:, None])  # (N, heads, S, M)
        return self.resid_dropout(self.c_proj(join_heads(scores.softmax(-1) @ values)))


def has_next(mask):
    """(N, K, R), True where a neighbor token is followed by one to copy, to (N, M)."""
    return (mask & F.pad(mask[..., 1:], (0, 1))).flatten(1)


def copy_keys(encoded, mask):
    """
    Keys (N, heads, M, d + 2) from encoded neighbors (N, M, D) with mask (N, K, R). The last two dimensions are the
    mask, and 1 for the null key, which is at the last position: no token follows it.
    """
    N, M, _ = encoded.shape
    is_valid = has_next(mask)
    flags = torch.zeros(N, M, 2, dtype=encoded.dtype, device=encoded.device)
    flags[..., 0].masked_fill_(~is_valid, -1e4)
    flags[:, -1, 0], flags[:, -1, 1] = 0, 1
    keys = split_heads(encoded * is_valid[..., None], COPY_HEADS)
    return torch.cat([keys, flags[:, None].expand(N, COPY_HEADS, M, 2)], dim=-1)


def count_matches(windows, neighbors, longest):
    """
    Match lengths: how many consecutive tokens agree, going back from a position and one of its neighbors' (N, K, R), at
    most `longest`. The positions are the last S of windows (N, longest + S); -1 agrees with nothing. (N, S, M) int8.
    """
    S, R = windows.shape[1] - longest, neighbors.shape[2]
    equal = windows[..., None, None] == neighbors[:, None]  # (N, longest + S, K, R)
    agrees = torch.ones_like(equal[:, :S])  # so far
    count = agrees.new_zeros(agrees.shape, dtype=torch.int8)
    for i in range(longest):  # the i-th token before each
        agrees = agrees & F.pad(equal[:, longest - i:longest - i + S, :, :R - i], (i, 0))
        count = count + agrees
    return count.flatten(2)


def chunk_windows(tokens, L, chunk_size, longest):
    """
    The tokens (B, T) that read the neighbors of each of L chunks, its last one and the C - 1 after it, with the
    `longest` before them: (B * L, longest + C), -1 where there is none.
    """
    T, C = tokens.shape[1], chunk_size
    tokens = F.pad(tokens, (longest, max(0, C - 1 + L * C - T)), value=-1)
    return tokens[:, C - 1:].unfold(1, C + longest, C)[:, :L].flatten(0, 1)


class OwnContext(nn.Module):
    """
    Attention of each position to own_pointers: the tokens that followed its last tokens earlier in the sequence. A
    pointer's score is that of its longest match plus that of its share, which depend on the position's activation; its
    value is its token's embedding. A null pointer is for attending to nothing.
    """

    def __init__(self, config):
        super().__init__()
        self.ln = LayerNorm(config.n_embd, bias=config.bias)
        self.c_score = nn.Linear(config.n_embd, POINTER_HEADS * (LONGEST + SHARES + 2))  # of lengths, shares and null
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def init_scores(self):
        """Start with more for longer matches and larger shares, by head more or less of it, and nothing as likely."""
        nn.init.zeros_(self.c_proj.weight)
        with torch.device('cpu'):  # transformers makes models on the meta device
            steepness = torch.linspace(0.1, 0.6, POINTER_HEADS)[:, None]
            nothing = torch.full((POINTER_HEADS, 1), 3.0)
            scores = [torch.arange(LONGEST + 1) * steepness, -torch.arange(SHARES) * (0.5 * steepness + 0.05), nothing]
        with torch.no_grad():
            self.c_score.bias.copy_(torch.cat(scores, dim=1).flatten())

    def forward(self, x, values, pointers):
        """x (B, T, D); values, a table (V, d) for each head; pointers (B, T, P, 3)."""
        B, T, P, _ = pointers.shape
        tokens, lengths, shares = pointers.unbind(-1)  # (B, T, P)
        by_length, by_share, nothing = self.c_score(self.ln(x)).float().unflatten(-1, (POINTER_HEADS, -1)).split(
            [LONGEST + 1, SHARES, 1], dim=-1)
        indices = [f[:, :, None].expand(B, T, POINTER_HEADS, P) for f in (lengths, share_buckets(shares))]
        scores = by_length.gather(-1, indices[0]) + by_share.gather(-1, indices[1])
        scores = scores.masked_fill(lengths[:, :, None] == 0, -1e4)
        weights = torch.cat([nothing, scores], dim=-1).softmax(-1)[..., 1:]  # (B, T, heads, P)
        # embedding_bag sums weighted rows without storing them: (B, T, P, D) would be the step's largest tensor
        y = [F.embedding_bag(tokens.flatten(0, 1), table, mode='sum', per_sample_weights=w.flatten(0, 1))
             for table, w in zip(values, weights.unbind(2), strict=True)]
        return self.resid_dropout(self.c_proj(torch.cat(y, dim=-1).view(B, T, -1)))


def share_buckets(shares):
    return (shares // (OCTAVE // 2)).clamp_max(SHARES - 1)


class PointerMixture(nn.Module):
    """
    Mixes pointers into the prediction (after the pointer sentinel of Merity et al. 2016): a softmax over the decoder
    and the pointers says how much of the probability each gives. A pointer's score is the logarithm of its share, plus
    what its longest match and its share are worth at the position, by the final activation. No gradient goes back
    through that: the decoder learns what it would without pointers, and stays the model to use without them.

    Added to a trained decoder it is silent until the first optimizer step. Pointers of no weight would get no gradient,
    and small ones learn slowly: so its value is the decoder's, and its gradient that of pointers with a weight.
    """

    def __init__(self, config):
        super().__init__()
        self.score = nn.Linear(config.n_embd, LONGEST + SHARES + 2)  # of lengths, shares, and the decoder
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def silence(self):
        nn.init.constant_(self.score.bias[-1], SILENT)

    def is_silent(self):
        """Whether no step has been taken since silence(), as a tensor: a Python bool would break a compiled graph."""
        return (self.score.bias[-1] == SILENT) & ~self.score.weight.any()

    def forward(self, x, pointers):
        """x (B, T, D), pointers (B, T, P, 3), to log-weights of the decoder (B, T, 1) and of the pointers (B, T, P)."""
        lengths, shares = pointers[..., 1].long(), pointers[..., 2].long()
        by_length, by_share, decoder = self.score(x.detach()).float().split([LONGEST + 1, SHARES, 1], dim=-1)
        scores = by_length.gather(-1, lengths) + by_share.gather(-1, share_buckets(shares))
        scores = (scores - shares * (math.log(2) / OCTAVE)).masked_fill(lengths == 0, -1e4)
        return torch.cat([decoder, scores], dim=-1).log_softmax(-1).split([1, scores.shape[-1]], dim=-1)


@torch.no_grad()
def own_pointers(tokens, doc_ids=None):
    """
    Pointers of tokens (B, T) into their own context: (B, T, OWN_POINTERS, 3) int64, as RETRO.forward has them. They are
    the distinct tokens that followed the most recent OWN_PLACES earlier places of the last OWN_LENGTHS tokens, of the
    same document by doc_ids (B, T). No T x T comparison: equal runs stand side by side when their hashes are sorted.
    """
    T = tokens.shape[1]
    documents = torch.zeros_like(tokens) if doc_ids is None else doc_ids
    sums, is_run, keys, unlike = documents * HASHES[0], torch.ones_like(tokens, dtype=torch.bool), [], -torch.arange(
        1, T + 1, device=tokens.device)
    for n in range(1, min(OWN_LENGTHS[-1], T) + 1):
        sums = sums + F.pad(tokens[:, :T - n + 1] + 1, (n - 1, 0)) * HASHES[n]  # int64 wraps around
        is_run = is_run & F.pad(documents[:, :T - n + 1] == documents[:, n - 1:], (n - 1, 0), value=False)
        if n in OWN_LENGTHS:
            keys.append(torch.where(is_run, sums, unlike))
    keys, order = torch.stack(keys, dim=1).sort(dim=-1, stable=True)  # (B, lengths, T)
    places = []
    for n in range(1, min(OWN_PLACES, T - 1) + 1):  # the n-th place before each
        place = torch.where(keys[..., n:] == keys[..., :-n], order[..., :-n], -1)
        places.append(torch.empty_like(order).scatter_(-1, order, F.pad(place, (n, 0), value=-1)))
    if not places:
        return tokens.new_zeros(*tokens.shape, OWN_POINTERS, 3)
    places = torch.stack(places, dim=-1)  # (B, lengths, T, OWN_PLACES)
    lengths = torch.tensor(OWN_LENGTHS[:places.shape[1]], device=tokens.device)
    # a place of a long run is one of its shorter ones, too: together they count e^(GROWTH * length)
    # rounded, so that sums are exact and equal shares are equal
    weights = (64 * (torch.exp(GROWTH * lengths) - F.pad(torch.exp(GROWTH * lengths[:-1]), (1, 0)))).round()
    lengths, weights = (x.repeat_interleave(places.shape[-1]) for x in (lengths, weights))  # (M,)
    places = places.transpose(1, 2).flatten(2)  # (B, T, M)
    is_place = places >= 0
    found = torch.where(is_place, tokens.gather(1, (places + 1).flatten(1)).view_as(places), -1).int()
    is_same = found[..., :, None] == found[..., None, :]  # (B, T, M, M)
    weights = weights * is_place
    share = (is_same * weights[..., None, :]).sum(-1) * (is_place & ~is_same.tril(-1).any(-1))  # each token once
    longest = (is_same * (lengths * is_place).to(torch.int8)[..., None, :]).amax(-1)
    preference = share - torch.arange(share.shape[-1], device=share.device) / 64  # of equal shares the first
    best = preference.topk(min(OWN_POINTERS, share.shape[-1]), dim=-1).indices
    share = share.gather(-1, best)
    parts = -OCTAVE * (share / weights.sum(-1, keepdim=True).clamp_min(1e-9)).clamp(1e-9, 1).log2()
    pointers = (found.gather(-1, best), longest.gather(-1, best), parts.round())
    pointers = torch.stack([x.long() for x in pointers], dim=-1)
    pointers = pointers * (share > 0)[..., None]
    return F.pad(pointers, (0, 0, 0, OWN_POINTERS - pointers.shape[2]))


class ChunkedCrossAttention(nn.Module):
    """
    Section 2.4. The neighbors of chunk u go to its last token, the first that may depend on them, and to the C - 1
    tokens after it: shifted by C - 1, the sequence falls into whole chunks again.
    """

    def __init__(self, config):
        super().__init__()
        self.ln = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CopyAttention(config) if config.retrieval_copy else CrossAttention(config)
        self.copies, self.chunk_size = config.retrieval_copy, config.retrieval_chunk_size

    def forward(self, x, neighbors):
        """x (B, T, D) and a NeighborContext of L <= T / C chunks, to (B, T, D); zero where a chunk has no neighbor."""
        (B, T, D), L, C = x.shape, neighbors.found.shape[1], self.chunk_size
        shifted = F.pad(self.ln(x)[:, C - 1:C - 1 + L * C], (0, 0, 0, max(0, C - 1 + L * C - T)))
        queries = shifted.reshape(B * L, C, D)
        if self.copies:
            y = self.attn(queries, neighbors.keys, neighbors.values, neighbors.matches)
        else:
            mask = neighbors.mask.flatten(1) | ~neighbors.found.view(B * L, 1)  # no softmax over nothing
            y = self.attn(queries, neighbors.keys, mask[:, None, None])
        y = y.view(B, L, C, D) * neighbors.found[..., None, None]
        return F.pad(y.view(B, L * C, D), (0, 0, C - 1, max(0, T - C + 1 - L * C)))[:, :T]


class Block(nn.Module):
    """
    A decoder block: self-attention, in some copying from the own context, in retrieval blocks chunked cross-attention,
    MLP. The first retrieval block owns the encoder, which is conditioned on its activations before the cross-attention.
    """

    def __init__(self, config, copies=False, retrieves=False, encodes=False):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config)
        self.own = OwnContext(config) if copies else None
        self.encoder = Encoder(config) if encodes else None
        self.cca = ChunkedCrossAttention(config) if retrieves else None
        self.ln_2 = LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, own=None, neighbors=None):
        """
        x (B, T, D); mask as in attend, None: causal; own, values and pointers for OwnContext; neighbors a
        NeighborContext or None. Returns x and the neighbors, which the first retrieval block encodes for those after.
        """
        x = x + self.attn(self.ln_1(x), mask, causal=mask is None)
        if self.own is not None:
            x = x + self.own(x, *own)
        if self.cca is not None and neighbors is not None:
            if self.encoder is not None:
                B, L = neighbors.found.shape
                chunks = x[:, :L * self.cca.chunk_size].reshape(B * L, self.cca.chunk_size, -1)
                keys = self.encoder(neighbors.embeddings, neighbors.mask, chunks, neighbors.is_chunk)
                if self.cca.copies:
                    keys = copy_keys(keys.to(neighbors.values.dtype), neighbors.mask)
                neighbors = neighbors._replace(keys=keys)
            x = x + self.cca(x, neighbors)
        return x + self.mlp(self.ln_2(x)), neighbors


def to_autocast_dtype(x):
    """Cast once to the precision that autocast computes in, so that later operations need not."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class RETRO(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        layers = config.retrieval_layers if config.has_neighbors else []
        own_layers = config.own_context_layers if config.copy_own_context else []
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, number in own_layers, number in layers,
                                   config.has_encoder and number == min(layers))
                             for number in range(1, config.n_layer + 1)]),
            ln_f=LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied, as in GPT-2
        self.mix = nn.Linear(2 * config.n_embd, config.n_embd, bias=False) if config.token_mix else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
                if getattr(module, 'bias', None) is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():  # residual branches, scaled down by depth as in GPT-2
            if name.endswith('c_proj.weight'):
                depth = config.retrieval_encoder_layers if '.encoder.' in name else config.n_layer
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * depth))
            if config.retrieval_copy and name.endswith('cca.attn.c_proj.weight'):
                nn.init.zeros_(parameter)
        for module in self.modules():
            if isinstance(module, OwnContext):
                module.init_scores()
        if self.mix:  # the two tokens before: rotated, and smaller than the token itself
            nn.init.orthogonal_(self.mix.weight, gain=0.5)
        self.mixture = PointerMixture(config) if config.has_pointers else None  # last: the rest starts as in a GPT

    def forward(self, tokens, targets=None, neighbors=None, neighbor_mask=None, doc_ids=None, pointers=None,
                loss_reduction='mean'):
        """
        tokens (B, T), any T up to block_size; targets (B, T), -1 where there is none; neighbors (B, L, K, R) of the
        L <= T / C complete chunks, and neighbor_mask of the same shape, True where there is a token; doc_ids (B, T / C)
        of the chunks: a token attends only to tokens of its own document. pointers (B, T, P, 3): for each position up
        to P distinct tokens that came next where its last tokens stand in the knowledge base, each with the length of
        the longest match, 0 where there is no pointer, and its share, in parts of an octave below all. Returns
        logits (B, T, V) and, with targets, the loss in nats: their 'mean', 'sum' or 'none', (B, T). With pointers the
        logits are log-probabilities of the mixture, or with targets the decoder's own; the loss is that of the mixture,
        and its gradient is the sum of two: the mixture learns from it, and the decoder from the loss without pointers.
        """
        x = self.hidden(tokens, neighbors, neighbor_mask, doc_ids)
        if targets is None:
            return self.predict(x, pointers), None
        logits, nats = self.score(x, targets, pointers)
        if loss_reduction == 'none':
            return logits, nats
        return logits, nats.sum() / ((targets >= 0).sum() if loss_reduction == 'mean' else 1)

    def score(self, x, targets, pointers=None):
        """Of final activations x (B, T, D) the decoder's logits (B, T, V) and the nats (B, T) of the targets."""
        logits = self.lm_head(x)
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction='none')
        nats, is_target = nats.view_as(targets), targets >= 0
        if pointers is not None and self.mixture is not None:
            decoder, scores = self.mixture(x, pointers)
            is_other = pointers[..., 0] != targets[..., None]
            named = scores.masked_fill(is_other, -1e4).logsumexp(-1)  # (B, T)
            mixed = -torch.logaddexp(decoder[..., 0] - nats.detach(), named)
            value = torch.where(self.mixture.is_silent(), nats, mixed).detach()
            nats = (value + (mixed - mixed.detach()) + (nats - nats.detach())) * is_target  # its gradient: two in one
        return logits, nats

    def predict(self, x, pointers=None):
        """Logits (B, T, V) of final activations x (B, T, D); with pointers (B, T, P, 3) log-probabilities."""
        logits = self.lm_head(x)
        if pointers is None or self.mixture is None:
            return logits
        decoder, scores = self.mixture(x, pointers)
        is_silent = self.mixture.is_silent()
        decoder, scores = decoder.masked_fill(is_silent, 0.0), scores.masked_fill(is_silent, -1e4)
        log_p = logits.float().log_softmax(-1) + decoder
        tokens = pointers[..., 0].long()
        # a token has one pointer at most; those without a match add nothing to their token, 0
        return log_p.scatter_reduce(-1, tokens, torch.logaddexp(log_p.gather(-1, tokens), scores), 'amax')

    def hidden(self, tokens, neighbors=None, neighbor_mask=None, doc_ids=None, padding=0):
        """
        The final activations (B, T, D), before lm_head. The arguments are those of forward, and `padding`, the number
        of tokens at the start that are none: nothing attends to them, and positions count from the first real one.
        """
        c, T, mask = self.config, tokens.shape[1], None
        if T - padding > c.block_size:
            raise ValueError(f'{T - padding} tokens are more than block_size {c.block_size}')
        x = self.transformer.wte(tokens)
        if doc_ids is not None:
            mask = document_starts(doc_ids, c.retrieval_chunk_size)
            doc_ids = F.pad((doc_ids[:, 1:] != doc_ids[:, :-1]).cumsum(1), (1, 0))  # a document that recurs is another
            doc_ids = doc_ids.repeat_interleave(c.retrieval_chunk_size, dim=1)  # (B, T)
        elif padding:  # a document of its own
            doc_ids = (torch.arange(T, device=tokens.device) >= padding).long().expand_as(tokens)
        if doc_ids is not None and (padding or (self.training and c.dropout) or not takes_documents(
                x.device.type, to_autocast_dtype(x).dtype, c.n_embd // c.n_head)):
            mask = (doc_ids[:, :, None] == doc_ids[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        own = (self.pointer_tables(), own_pointers(tokens, doc_ids)) if c.copy_own_context else None
        is_read = neighbors is not None and c.has_neighbors and neighbors.shape[1] > 0
        if is_read:
            neighbors = self.read_neighbors(tokens, neighbors, neighbor_mask, padding)
        x = self.mix_tokens(x, doc_ids)
        x = self.transformer.drop(x + F.pad(self.transformer.wpe.weight[:T - padding], (0, 0, padding, 0)))
        for block in self.transformer.h:
            x, neighbors = block(x, mask, own, neighbors if is_read else None)
        return self.transformer.ln_f(x)

    def mix_tokens(self, x, doc_ids=None):
        """
        Add to each embedding of x (..., S, D) a linear mix of the two before it (after the Canon layers of arXiv
        2512.17351), where they are of the same document by doc_ids (B, S). Without token_mix it returns x.
        """
        if self.mix is None:
            return x
        S, earlier = x.shape[-2], []
        for n in (1, min(2, S)):
            y = F.pad(x[..., :S - n, :], (0, 0, n, 0))
            if doc_ids is not None:
                y = y * F.pad(doc_ids[:, n:] == doc_ids[:, :S - n], (n, 0))[..., None]
            earlier.append(y)
        return x + self.mix(torch.cat(earlier, dim=-1))

    def pointer_tables(self):
        """What OwnContext reads of a pointer's token: tables (V, d) of normalized embeddings, one for each head."""
        weight = self.transformer.wte.weight.detach().float()  # without gradients, which are not worth the time
        return [x.contiguous() for x in F.layer_norm(weight, weight.shape[-1:]).chunk(POINTER_HEADS, dim=-1)]

    def read_neighbors(self, tokens, neighbors, neighbor_mask, padding=0):
        """
        What the blocks need to read the neighbors (B, L, K, R) of the chunks of tokens (B, T), of which the first
        `padding` are none: a NeighborContext. An encoder's keys come later.
        """
        c, L = self.config, neighbors.shape[1]
        longest = min(c.retrieval_longest_match, c.retrieval_chunk_size)  # the chunk before may be another document's
        tokens = F.pad(tokens[:, padding:], (padding, 0), value=-1)  # matches nothing
        windows = chunk_windows(tokens, L, c.retrieval_chunk_size, longest)
        is_chunk = None
        if c.has_encoder and padding:
            is_chunk = tokens[:, :L * c.retrieval_chunk_size].reshape(-1, c.retrieval_chunk_size) >= 0
        neighbors, mask = neighbors.flatten(0, 1), neighbor_mask.flatten(0, 1)
        context = self.neighbor_context(neighbors, mask)
        matches = self.match_neighbors(windows, neighbors, mask).to(context.values.dtype) if c.retrieval_copy else None
        return context._replace(found=context.found.view(-1, L), matches=matches, is_chunk=is_chunk)

    def neighbor_context(self, neighbors, mask):
        """The NeighborContext of neighbors (N, K, R) and their mask, whoever reads them; found is (N,)."""
        c, found = self.config, mask.flatten(1).any(-1)
        # without an encoder no gradient goes through the neighbors' embeddings: the gain is not worth the time
        with torch.set_grad_enabled(c.has_encoder and torch.is_grad_enabled()):
            plain = to_autocast_dtype(self.transformer.wte(neighbors))  # (N, K, R, D)
            embeddings = self.mix_tokens(plain)
            keys = None
            if not c.has_encoder:
                keys = F.layer_norm(embeddings, embeddings.shape[-1:]).to(plain.dtype).flatten(1, 2)
                keys = copy_keys(keys, mask)
        if not c.retrieval_copy:
            return NeighborContext(found, mask, embeddings, keys, None, None)
        values = F.layer_norm(plain.detach(), plain.shape[-1:]).to(plain.dtype)
        values = F.pad(values[..., 1:, :], (0, 0, 0, 1)).flatten(1, 2)  # of the token after each: (N, M, D)
        return NeighborContext(found, mask, embeddings, keys, split_heads(values, COPY_HEADS).contiguous(), None)

    def match_neighbors(self, windows, neighbors, mask):
        """Match lengths (N, S, M) as of count_matches, 0 where there is nothing to copy."""
        longest = min(self.config.retrieval_longest_match, self.config.retrieval_chunk_size)
        return count_matches(windows, neighbors, longest) * has_next(mask)[:, None]

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """
        A decoder with GPT-2's weights: 'gpt2', 'gpt2-medium', ..., or a folder that transformers saved. `overrides`
        are fields of RETROConfig. What GPT-2 has not starts silent (start_from). block_size may be smaller; rows that
        pad the vocabulary are the mean token. An export of a model without biases has zeros for them, and says so. Only
        safetensors are read. ValueError if the source is no plain GPT-2, or does not fit.
        """
        from transformers import GPT2LMHeadModel
        theirs = gpt2_fields(name)
        ours = RETROConfig(**{**theirs, 'use_retrieval': False, **overrides})
        fits = dict(block_size=ours.block_size <= theirs['block_size'],
                    vocab_size=0 <= ours.vocab_size - theirs['vocab_size'] < 128, token_mix=True, copy_own_context=True)
        wrong = [f'{key} is {getattr(ours, key)} and that of {name} {value}' for key, value in theirs.items()
                 if not fits.get(key, getattr(ours, key) == value)]
        if wrong:
            raise ValueError(f'{"; ".join(wrong)} (vocab_size is of the tokenizer): use the same')
        source, report = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True, use_safetensors=True)
        odd = [key for keys in report.values() for key in keys if 'masked_bias' not in str(key)]  # of earlier versions
        weights = source.state_dict()
        if odd or not torch.equal(weights.pop('lm_head.weight'), weights['transformer.wte.weight']):
            raise ValueError(f'the weights of {name} are not those of its config ({odd[:9] or "lm_head is not tied"})')
        if not ours.bias and any(weight.any() for key, weight in weights.items() if key.endswith('.bias')):
            raise ValueError(f'the config of {name} says that it has no biases, but some are not zero')
        model = cls(ours)
        # GPT-2's matrices are (in, out)
        model.start_from({key: w.t() if '.c_' in key and w.dim() == 2 else w for key, w in weights.items()})
        return model

    @torch.no_grad()
    def start_from(self, weights):
        """
        Start as the GPT with these weights, {parameter's name: tensor}. Its block may be longer, and its vocabulary
        less padded. What it has not starts silent: until the first step the outputs are the GPT's, exactly.
        """
        for name, parameter in self.named_parameters():
            if name in weights:
                weight = weights[name][:len(parameter)]
                parameter[:len(weight)].copy_(weight)
                parameter[len(weight):] = weight.mean(0)  # rows that pad the vocabulary
            elif name.endswith(('mix.weight', 'cca.attn.c_proj.weight')):
                parameter.zero_()
        if self.mixture and 'mixture.score.weight' not in weights:
            self.mixture.silence()

    def freeze_decoder(self):
        """Train what retrieval adds, and nothing else: without retrieval the model stays what it is."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(bool(re.match(RETRIEVES, name)))

    def freeze_retrieval(self):
        """Train the decoder, and leave what retrieval adds as it is."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not re.match(RETRIEVES, name))

    def num_parameters(self):
        """Parameters without the position embeddings, as nanoGPT counts them; the tied token embedding once."""
        return sum(p.numel() for name, p in self.named_parameters() if not name.endswith('wpe.weight'))

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW that decays matrices and embeddings, but neither biases nor layer norms."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'cpu'))

    def flops_per_token(self):
        """
        Operations of a training step per token, by PaLM's count (arXiv 2204.02311, appendix B): 6 per weight applied to
        it, and 12 D per position that it attends to in each layer; fewer where no gradient is propagated.
        """
        c = self.config
        D, T, C, K = c.n_embd, c.block_size, c.retrieval_chunk_size, c.retrieval_k_neighbors
        mix = 6 * 2 * D * D * c.token_mix
        flops = c.n_layer * (6 * 12 * D * D + 12 * D * T) + 6 * D * c.vocab_size + mix
        scores = LONGEST + SHARES + 2
        flops += c.copy_own_context * len(c.own_context_layers) * (
            6 * D * (D + POINTER_HEADS * scores) + 4 * D * OWN_POINTERS)
        if not self.lm_head.weight.requires_grad:  # frozen: gradients go through it from where neighbors are read on
            above = c.n_layer - min(c.retrieval_layers) if c.has_neighbors else 0
            flops = flops / 3 + above * (24 * D * D + 8 * D * T) + c.has_neighbors * 2 * D * (8 * D + c.vocab_size)
        flops += c.has_pointers * 4 * D * scores  # no gradient goes back from these
        if not c.has_neighbors:
            return flops
        R, ratio = 2 * C, 2 * K  # neighbor tokens per token
        flops += c.retrieval_encoder_layers * ratio * (6 * 12 * D * D + 12 * D * R)
        flops += bool(c.retrieval_encoder_layers) * (ratio * (6 * 2 * D * D + 12 * D * C) + 6 * 2 * D * D)
        flops += ratio * mix * (1 if c.has_encoder else 1 / 3)
        # copying projects no keys and values, and sends no gradient back to them but to an encoder's keys
        projected, passes = (1, 10 if c.has_encoder else 8) if c.retrieval_copy else (1 + ratio, 12)
        return flops + len(c.retrieval_layers) * (6 * 2 * D * D * projected + passes * D * K * R)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, retrieve=None, point=None, temperature=1.0, top_k=None,
                 end_of_text=None, allowed=None, generator=None, padding=0):
        """
        Continue tokens (B, T), which start on the chunk grid, by up to max_new_tokens each: (B, T + n). The first
        `padding` of them, less than a chunk, are none. `retrieve` is called once for each newly completed chunk
        (B, 1, C), -1 where it has no token, and returns its neighbors (B, 1, K, R) and their mask. `point` is called
        for each new token with the last ones, up to LONGEST, (B, n), and returns their pointers (B, n, P, 3).
        Temperature 0 takes the most likely token. Stops early when all have reached `end_of_text`. Only ids in
        `allowed` (n,) bool are chosen: others pad the embedding, or are gaps in the vocabulary. Slow, and plain: the
        whole window is computed for every token. generation/engine.py does the same fast.
        """
        block_size = self.config.block_size
        C = min(self.config.retrieval_chunk_size, block_size)
        neighbors, masks, ended = [], [], torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            while retrieve and (len(neighbors) + 1) * C <= tokens.shape[1]:
                chunk = tokens[:, None, len(neighbors) * C:(len(neighbors) + 1) * C].clone()
                if not neighbors:
                    chunk[..., :padding] = -1
                found, mask = retrieve(chunk)
                neighbors.append(found)
                masks.append(mask)
            first = max(0, math.ceil((tokens.shape[1] - block_size) / C))  # whole chunks leave the window
            visible = [torch.cat(x[first:], 1) for x in (neighbors, masks)] if neighbors[first:] else []
            read, absent = tokens[:, first * C:], padding if first == 0 else 0
            x = self.hidden(read, *visible, padding=absent)[:, -1:]
            logits = self.predict(x, point(read[:, absent:][:, -LONGEST:])[:, -1:] if point else None)[:, 0].float()
            if allowed is not None:
                logits = logits[:, :len(allowed)].masked_fill(~allowed, -math.inf)
            if temperature == 0:
                next_token = logits.argmax(-1, keepdim=True)
            else:
                logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # which may be tiny
                if top_k:
                    smallest = logits.topk(min(top_k, logits.shape[-1])).values[:, [-1]]
                    logits = logits.masked_fill(logits < smallest, -math.inf)
                next_token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, next_token], dim=1)
            ended |= next_token[:, 0] == (-1 if end_of_text is None else end_of_text)
            if ended.all():
                break
        return tokens
