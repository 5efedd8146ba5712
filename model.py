"""
RETRO (Borgeaud et al. 2022, arXiv 2112.04426) in one file: a GPT-2 decoder, some of whose blocks also attend, chunk by
chunk, to neighbors that were retrieved with the chunk before. With use_retrieval = False it is nanoGPT's GPT.
Beside the paper's model, behind options: cross-attention that can copy from its first step on, and a token mix.

Shapes: B sequences of T tokens, L = T / C chunks of C tokens, K neighbors a chunk, each R = 2C tokens (a chunk and its
continuation), D = n_embd. The model sees token ids and masks only; where neighbors come from is not its business.
"""
import inspect
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class RETROConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and layer norms, as in GPT-2
    use_retrieval: bool = True
    retrieval_layers: list = field(default_factory=list)  # blocks with cross-attention, from 1; empty: the paper's
    retrieval_chunk_size: int = 64  # C
    retrieval_k_neighbors: int = 2  # K
    retrieval_encoder_layers: int = 2
    token_mix: bool = False  # a token's embedding takes up those of the two before it
    retrieval_copy: bool = False  # cross-attention that can copy from its first step on; False: the paper's
    retrieval_longest_match: int = 6  # tokens in a row that are counted for it; 0: none are

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} must be a multiple of n_head {self.n_head}')
        if not self.use_retrieval:
            return
        if self.retrieval_copy and self.n_embd % CopyAttention.heads:
            raise ValueError(f'n_embd {self.n_embd} must be a multiple of {CopyAttention.heads} for retrieval_copy')
        if not self.retrieval_layers:
            self.retrieval_layers = default_retrieval_layers(self.n_layer)
        wrong = [p for p in self.retrieval_layers if not (isinstance(p, int) and 1 <= p <= self.n_layer)]
        if wrong:
            raise ValueError(f'retrieval_layers {self.retrieval_layers} must be numbers from 1 to n_layer '
                             f'{self.n_layer}, but {wrong} are not')
        if self.retrieval_chunk_size < 1 or self.block_size % self.retrieval_chunk_size:
            raise ValueError(f'block_size {self.block_size} must be a multiple of retrieval_chunk_size '
                             f'{self.retrieval_chunk_size}')
        if (self.retrieval_k_neighbors < 1 or self.retrieval_encoder_layers < 0
                or not 0 <= self.retrieval_longest_match <= 127):  # matches are counted in int8
            raise ValueError(f'retrieval_k_neighbors must be at least 1, retrieval_encoder_layers at least 0, and '
                             f'retrieval_longest_match from 0 to 127, but are {self.retrieval_k_neighbors}, '
                             f'{self.retrieval_encoder_layers} and {self.retrieval_longest_match}')


def default_retrieval_layers(n_layer):
    """Every third block from the 6th, in models deeper than 15 from the 9th; the last one included (section 2.4)."""
    first = 9 if n_layer > 15 else 6
    return sorted({*range(first, n_layer + 1, 3), n_layer})


class SelfAttention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x, mask=None, causal=False):
        """x (N, S, D); mask broadcasts to (N, heads, S, S) and is True where a query may look."""
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
        """x (N, S, D) looks at context (N, M, D) where mask, which broadcasts to (N, heads, S, M), is True."""
        q = split_heads(self.c_q(x), self.n_head)
        k, v = (split_heads(y, self.n_head) for y in self.c_kv(context).chunk(2, dim=-1))
        y = attend(q, k, v, mask, dropout=self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(join_heads(y)))


class CopyAttention(nn.Module):
    """
    Cross-attention that can copy from its first step on. A position looks for where its last tokens stand in a
    neighbor: to its scores comes a weight, learned by head, times how many tokens in a row agree. What it finds there
    is what came next: a key's value is the embedding of the token after it. It may also look at nothing.
    """
    heads = 2  # as good as more of them, which cost a pass over the scores each

    def __init__(self, config):
        super().__init__()
        self.c_q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.match = nn.Parameter(torch.linspace(0.5, 3.0, self.heads))
        self.nothing = nn.Parameter(torch.full((self.heads,), 4.0))  # as much as e^4 of the keys that don't match
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, keys, values, matches):
        """What x (N, S, D) gains from the keys (N, heads, M, d + 2), values and matches that RETRO.to_copy gives."""
        q = split_heads(self.c_q(x), self.heads)
        N, heads, S, d = q.shape
        q = torch.cat([q / math.sqrt(d), torch.ones_like(q[..., :1]),
                       self.nothing.to(q.dtype).view(heads, 1, 1).expand(N, heads, S, 1)], dim=-1)
        # expanded over N, since its gradient is then a sum over what lies together: several times faster on a CPU
        match = self.match.to(q.dtype).expand(N, heads)[..., None, None]
        scores = torch.addcmul(q @ keys.transpose(-2, -1), match, matches[:, None])  # (N, heads, S, M)
        return self.resid_dropout(self.c_proj(join_heads(scores.softmax(-1) @ values)))


def count_matches(tokens, neighbors, chunk_size, longest):
    """
    How many tokens in a row agree, going back from both, at most `longest`, of tokens (B, T) and neighbors (B, L, K,
    R): (B, L, C, K * R) int8, for the last token of each of the L chunks and the C - 1 tokens after it.
    """
    T, L, C, R = tokens.shape[1], neighbors.shape[1], chunk_size, neighbors.shape[3]
    tokens = F.pad(tokens, (longest, max(0, C - 1 + L * C - T)), value=-1)  # -1 agrees with nothing
    windows = tokens[:, C - 1:].unfold(1, C + longest, C)[:, :L]  # (B, L, C + longest)
    equal = windows[..., None, None] == neighbors[:, :, None]  # (B, L, C + longest, K, R)
    run = torch.ones_like(equal[:, :, :C])
    count = run.new_zeros(run.shape, dtype=torch.int8)
    for i in range(longest):  # the i-th token before each
        run = run & F.pad(equal[:, :, longest - i:longest - i + C, :, :R - i], (i, 0))
        count = count + run
    return count.flatten(3)


def attend(q, k, v, mask=None, causal=False, dropout=0.0):
    """q (N, heads, S, d); k, v (N, heads, M, d); mask broadcasts to (N, heads, S, M), True where a query may look."""
    if q.device.type != 'cpu' or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, dropout_p=dropout)
    # for short sequences in bfloat16 on a CPU, plain products are several times faster than torch's fused kernel
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # (N, heads, S, M)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:  # added, which costs nothing on the way back
        scores += torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
    return F.dropout(scores.softmax(-1), dropout) @ v


def as_computed(x):
    """x in the precision that autocast computes in, so that what is made of it is not cast again and again."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def split_heads(x, n_head):
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)  # (N, S, D) -> (N, heads, S, D / heads)


def join_heads(x):
    return x.transpose(1, 2).flatten(2)  # (N, heads, S, D / heads) -> (N, S, D)


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh')  # as in GPT-2
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class ChunkedCrossAttention(nn.Module):
    """
    Section 2.4 of the paper. The neighbors of chunk u go to its last token, the first that may depend on them, and
    to the C - 1 tokens after it: shifted by C - 1, the sequence falls into whole chunks again.
    """

    def __init__(self, config):
        super().__init__()
        self.ln = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CopyAttention(config) if config.retrieval_copy else CrossAttention(config)
        self.chunk_size = config.retrieval_chunk_size

    def forward(self, x, found, *context):
        """
        What x (B, T, D) gains, (B, T, D), from the context (B * L, ...) that each of L <= T / C chunks looks at, where
        found (B, L): a chunk without neighbors gains nothing.
        """
        B, T, D = x.shape
        L, C = found.shape[1], self.chunk_size
        shifted = F.pad(self.ln(x)[:, C - 1:C - 1 + L * C], (0, 0, 0, max(0, C - 1 + L * C - T)))  # (B, L * C, D)
        y = self.attn(shifted.reshape(B * L, C, D), *context).view(B, L, C, D) * found[..., None, None]
        return F.pad(y.view(B, L * C, D), (0, 0, C - 1, max(0, T - C + 1 - L * C)))[:, :T]


def to_attend(encoded, neighbor_mask):
    """What CrossAttention looks at: which chunks found anything, (B, L); encoded (B * L, K * R, D); and its mask."""
    mask = neighbor_mask.flatten(2)  # (B, L, K * R)
    found = mask.any(-1)
    mask = mask | ~found[..., None]  # no softmax over nothing: those look at anything and their result is dropped
    return found, encoded.flatten(0, 1), mask.flatten(0, 1)[:, None, None]


class Block(nn.Module):
    """A decoder block: self-attention, in some blocks chunked cross-attention, MLP."""

    def __init__(self, config, retrieves):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config)
        self.cca = ChunkedCrossAttention(config) if retrieves else None
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)


class EncoderBlock(nn.Module):
    """A bidirectional block over a neighbor; the first one also looks at the chunk that retrieved it."""

    def __init__(self, config, looks_at_chunk):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = SelfAttention(config)
        if looks_at_chunk:
            self.ln_cross = nn.LayerNorm(config.n_embd, bias=config.bias)
            self.ln_chunk = nn.LayerNorm(config.n_embd, bias=config.bias)
            self.cross = CrossAttention(config)
        self.looks_at_chunk = looks_at_chunk
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask, chunks):
        """x (B * L, K, R, D) and mask (B * L, K, R) of the neighbors; chunks (B * L, C, D) that retrieved them."""
        N, K, R, D = x.shape
        x = x + self.attn(self.ln_1(x).view(N * K, R, D), mask.view(N * K, 1, 1, R)).view(N, K, R, D)
        if self.looks_at_chunk:
            queries = self.ln_cross(x).view(N, K * R, D)
            x = x + self.cross(queries, self.ln_chunk(chunks)).view(N, K, R, D)
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """
    Neighbors, conditioned on the chunk that retrieved them (section 2.3; as in the paper's models the first block
    alone attends to the chunk). Token embeddings are the decoder's; positions are local to the neighbor.
    """

    def __init__(self, config):
        super().__init__()
        self.wpe = nn.Embedding(2 * config.retrieval_chunk_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([EncoderBlock(config, looks_at_chunk=i == 0)
                                for i in range(config.retrieval_encoder_layers)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, embeddings, mask, chunks):
        """embeddings (B, L, K, R, D), mask (B, L, K, R), chunks (B, L, C, D) to (B, L, K * R, D)."""
        B, L, K, R, D = embeddings.shape
        x = self.drop(embeddings + self.wpe.weight[:R]).view(B * L, K, R, D)
        mask = mask | ~mask.any(-1, keepdim=True)  # an absent neighbor looks at itself, and nothing looks at it
        for block in self.h:
            x = block(x, mask.view(B * L, K, R), chunks.flatten(0, 1))
        return self.ln_f(x).view(B, L, K * R, D)


class RETRO(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        retrieves = set(config.retrieval_layers) if config.use_retrieval else set()
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, retrieves=i + 1 in retrieves) for i in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        encodes = config.use_retrieval and (config.retrieval_encoder_layers or not config.retrieval_copy)
        self.encoder = Encoder(config) if encodes else None
        self.mix = nn.Linear(2 * config.n_embd, config.n_embd, bias=False) if config.token_mix else None
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():  # residual branches, scaled down by depth as in GPT-2
            if name.endswith('c_proj.weight'):
                depth = config.retrieval_encoder_layers if name.startswith('encoder.') else config.n_layer
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * depth))
            if config.retrieval_copy and name.endswith('cca.attn.c_proj.weight'):
                nn.init.zeros_(parameter)
        if self.mix:  # the token itself, and beside it the two before it, rotated and smaller
            nn.init.orthogonal_(self.mix.weight, gain=0.5)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def num_parameters(self):
        """Parameters without the position embeddings, as nanoGPT counts them; the tied token embedding once."""
        positions = self.transformer.wpe.weight.numel() + (self.encoder.wpe.weight.numel() if self.encoder else 0)
        return sum(p.numel() for p in self.parameters()) - positions

    def forward(self, tokens, targets=None, neighbors=None, neighbor_mask=None, documents=None):
        """
        tokens (B, T), any T up to block_size; targets (B, T), -1 where there is none; neighbors (B, L, K, R) of the
        L <= T / C complete chunks, with neighbor_mask of the same shape, True where there is a token; documents
        (B, T / C): a token looks only at tokens whose chunk has the same number. Returns logits (B, T, V) and the mean
        loss in nats, or None without targets.
        """
        logits = self.lm_head(self.hidden(tokens, neighbors, neighbor_mask, documents))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def hidden(self, tokens, neighbors=None, neighbor_mask=None, documents=None):
        """What the last layer norm gives, (B, T, D). The arguments are those of forward."""
        T, C = tokens.shape[1], self.config.retrieval_chunk_size
        if T > self.config.block_size:
            raise ValueError(f'{T} tokens are more than block_size {self.config.block_size}')
        mask = of_token = None
        if documents is not None:
            of_token = documents.repeat_interleave(C, dim=1)  # (B, T)
            mask = (of_token[:, :, None] == of_token[:, None, :]).tril()[:, None]  # (B, 1, T, T)
        retrieves = self.config.use_retrieval and neighbors is not None and neighbors.shape[1] > 0
        context = None
        x = self.mixed(self.transformer.wte(tokens), of_token)
        x = self.transformer.drop(x + self.transformer.wpe.weight[:T])
        for block in self.transformer.h:
            x = x + block.attn(block.ln_1(x), mask, causal=mask is None)
            if retrieves and block.cca is not None:
                if context is None:
                    encoded, plain = self.read(x, neighbors, neighbor_mask)
                    context = (self.to_copy(encoded, plain, tokens, neighbors, neighbor_mask)
                               if self.config.retrieval_copy else to_attend(encoded, neighbor_mask))
                x = x + block.cca(x, *context)
            x = x + block.mlp(block.ln_2(x))
        return self.transformer.ln_f(x)

    def mixed(self, x, of_token=None):
        """
        Embeddings x (..., S, D), with token_mix each with those of the two tokens before it (after the Canon layers of
        arXiv 2512.17351), where they have the same number in `of_token` (B, S).
        """
        if self.mix is None:
            return x
        before = []
        for n in (1, 2):
            y = F.pad(x[..., :-n, :], (0, 0, n, 0))
            if of_token is not None:
                y = y * F.pad(of_token[:, n:] == of_token[:, :-n], (n, 0))[..., None]
            before.append(y)
        return x + self.mix(torch.cat(before, dim=-1))

    def read(self, x, neighbors, neighbor_mask):
        """
        Neighbors (B, L, K, R) encoded, (B, L, K * R, D), and their plain embeddings (B, L, K, R, D). Without an encoder
        they are encoded as embeddings that are mixed and normalized.
        """
        if self.encoder:
            plain = as_computed(self.transformer.wte(neighbors))
            chunks = x[:, :neighbors.shape[1] * self.config.retrieval_chunk_size]
            return self.encoder(self.mixed(plain), neighbor_mask, chunks.unflatten(1, (neighbors.shape[1], -1))), plain
        # embeddings learn as the decoder's: to have them learn here, too, gains less than it takes
        with torch.no_grad():
            plain = as_computed(self.transformer.wte(neighbors))
            return F.layer_norm(self.mixed(plain), plain.shape[-1:]).flatten(2, 3), plain

    def to_copy(self, encoded, plain, tokens, neighbors, neighbor_mask):
        """
        What CopyAttention looks at. Which chunks found anything, (B, L). For N = B * L chunks of M = K * R tokens, keys
        (N, heads, M, d + 2), which are `encoded`, and values (N, heads, M, d), which are the `plain` embeddings (B, L,
        K, R, D) of the tokens after them. And matches (N, C, M). A key's last two dimensions are its mask, and whether
        it is the key for nothing, which is the last one: no token follows it.
        """
        B, L, K, R = neighbors.shape
        N, M, C, heads = B * L, K * R, self.config.retrieval_chunk_size, CopyAttention.heads
        longest = min(self.config.retrieval_longest_match, C)  # a chunk before may be another document's
        there = (neighbor_mask & F.pad(neighbor_mask[..., 1:], (0, 1))).view(N, M)  # with a token after it
        own = torch.zeros(N, M, 2, dtype=plain.dtype, device=plain.device)
        own[..., 0].masked_fill_(~there, -1e4)
        own[:, -1, 0], own[:, -1, 1] = 0, 1
        keys = encoded.to(plain.dtype).reshape(N, M, -1) * there[..., None]
        keys = torch.cat([split_heads(keys, heads), own[:, None].expand(N, heads, M, 2)], dim=-1)
        values = F.layer_norm(plain.detach(), plain.shape[-1:]).to(plain.dtype)
        values = F.pad(values[..., 1:, :], (0, 0, 0, 1)).view(N, M, -1)
        matches = count_matches(tokens, neighbors, C, longest).view(N, C, M) * there[:, None]
        found = neighbor_mask.flatten(2).any(-1)
        return found, keys, split_heads(values, heads).contiguous(), matches.to(plain.dtype)

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """
        A decoder with GPT-2's weights: 'gpt2', 'gpt2-medium', ..., or a folder that transformers saved. `overrides`
        are fields of RETROConfig; what retrieval adds to GPT-2 starts at random, and token_mix as no mix at all.
        """
        from transformers import GPT2LMHeadModel
        source = GPT2LMHeadModel.from_pretrained(name)
        c = source.config
        model = cls(RETROConfig(**{**dict(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer,
                                          n_head=c.n_head, n_embd=c.n_embd, bias=True, use_retrieval=False),
                                   **overrides}))
        ours = model.state_dict()
        linear = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')
        with torch.no_grad():
            for key, weight in source.state_dict().items():
                if not key.endswith(('.attn.bias', '.attn.masked_bias')):  # buffers of older versions
                    ours[key].copy_(weight.t() if key.endswith(linear) else weight)  # GPT-2 keeps them transposed
            if model.mix:
                model.mix.weight.zero_()
        return model

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW that decays matrices and embeddings, and neither biases nor layer norms; fused where it can be."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [{'params': [p for p in parameters if p.dim() >= 2], 'weight_decay': weight_decay},
                  {'params': [p for p in parameters if p.dim() < 2], 'weight_decay': 0.0}]
        fused = 'fused' in inspect.signature(torch.optim.AdamW).parameters and device_type in ('cuda', 'cpu')
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)

    def flops_per_token(self):
        """
        Floating point operations of a training step for one token, by PaLM's count (arXiv 2204.02311, appendix B): 6
        for each weight that it meets and 12 D for each position that it looks at, in each layer, less where no gradient
        goes back. A token brings K * R / C neighbor tokens along.
        """
        c = self.config
        D, T, C, R, K = c.n_embd, c.block_size, c.retrieval_chunk_size, 2 * c.retrieval_chunk_size, \
            c.retrieval_k_neighbors
        mix = 6 * 2 * D * D if c.token_mix else 0
        flops = c.n_layer * (6 * 12 * D * D + 12 * D * T) + 6 * D * c.vocab_size + mix
        if not c.use_retrieval:
            return flops
        share = K * R / C  # neighbor tokens for one token
        layers, crossing = c.retrieval_encoder_layers, min(c.retrieval_encoder_layers, 1)
        flops += layers * share * (6 * 12 * D * D + 12 * D * R)
        flops += crossing * (share * (6 * 2 * D * D + 12 * D * C) + 6 * 2 * D * D)
        flops += share * mix * (1 if self.encoder else 1 / 3)
        # what copies takes keys and values as they are, and carries no gradient back to them but to an encoder's keys
        projected = 1 if c.retrieval_copy else 1 + share
        looking = (12 if not c.retrieval_copy else 10 if self.encoder else 8) * D * K * R
        return flops + len(c.retrieval_layers) * (6 * 2 * D * D * projected + looking)

    def estimate_mfu(self, tokens_per_second, peak_flops):
        """Model FLOP utilization: the share of the machine's peak (FLOP/s) that the training step makes use of."""
        return self.flops_per_token() * tokens_per_second / peak_flops

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, retrieve=None, temperature=1.0, top_k=None, end_of_text=None,
                 vocabulary=None, generator=None):
        """
        Continue tokens (B, T), which start on the chunk grid, by up to max_new_tokens each: (B, T + n). `retrieve`
        takes each newly completed chunk, (B, 1, C), once, and gives its neighbors (B, 1, K, R) and their mask.
        Temperature 0 takes the most likely token. Stops early when all have come to `end_of_text`. Ids from
        `vocabulary` on, which pad the embedding, are never chosen.
        """
        C, block_size = self.config.retrieval_chunk_size, self.config.block_size
        neighbors, masks = [], []
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        for _ in range(max_new_tokens):
            while retrieve and (len(neighbors) + 1) * C <= tokens.shape[1]:
                start = len(neighbors) * C
                found, mask = retrieve(tokens[:, None, start:start + C])
                neighbors.append(found)
                masks.append(mask)
            first = max(0, math.ceil((tokens.shape[1] - block_size) / C))  # whole chunks leave the window
            window = tokens[:, first * C:]
            seen = neighbors[first:]
            x = self.hidden(window, torch.cat(seen, 1) if seen else None, torch.cat(masks[first:], 1) if seen else None)
            logits = self.lm_head(x[:, -1])[:, :vocabulary].float()
            if temperature == 0:
                next_token = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k:
                    lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, [-1]]
                    logits = logits.masked_fill(logits < lowest, -math.inf)
                next_token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, next_token], dim=1)
            if end_of_text is not None:
                ended |= next_token[:, 0] == end_of_text
                if ended.all():
                    break
        return tokens


def load_checkpoint(path, map_location='cpu'):
    """The dict that train.py saved at path. ValueError where there is none, or where it is something else."""
    if not os.path.isfile(path):
        raise ValueError(f'no checkpoint {path!r}: train first, or name the out_dir of a run that has been trained')
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
        with torch.device('meta'):  # shapes without memory
            expected = RETRO(RETROConfig(**checkpoint['model_args'])).state_dict()
        if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in checkpoint['model'].items()}:
            raise ValueError('its weights are not those of its model_args')
        return checkpoint
    except Exception as error:  # a foreign file can fail in any way
        raise ValueError(f'{path!r} is of another architecture, or no checkpoint of nanoRETRO '
                         f'({type(error).__name__}: {str(error)[:300]}): name the out_dir of a run of train.py'
                         ) from error


def pick_dtype(dtype, device):
    """
    The precision to compute in, by its name: the one asked for, or for 'auto' bfloat16 where the processor has it.
    ValueError where there is none of that name.
    """
    if dtype != 'auto':
        if dtype not in ('float32', 'bfloat16', 'float16'):
            raise ValueError(f"dtype {dtype!r} is none of 'auto', 'float32', 'bfloat16', 'float16'")
        return dtype
    if device.startswith('cuda'):
        return 'bfloat16' if torch.cuda.is_bf16_supported() else 'float16'
    fast = device == 'cpu' and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return 'bfloat16' if fast else 'float32'


def autocast(precision, device):
    """The context to run the model in."""
    return (torch.amp.autocast(device.split(':')[0], dtype=getattr(torch, precision)) if precision != 'float32'
            else nullcontext())


def keep_freed_memory():
    """
    glibc gives large blocks back to the system and has each of its pages made anew at the next step, which takes a
    fifth of a small model's time on a CPU. Tell it to keep them.
    """
    try:
        import ctypes
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
    except OSError:
        pass  # another C library
