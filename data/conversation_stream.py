"""
Training sequences of conversations: whole conversations, each on the chunk grid as if it were a document, packed into
sequences. Blended by weight, in an order that is a pure function of the seed and the conversations. The targets are the
tokens of answers alone.

Packing is first-fit: WINDOW conversations wait, each takes the first sequence of the step that has room and no
conversation of the same document; those that find none wait for the next step. So the state is how many conversations
of each dataset are drawn and which of them wait, and every rank packs the same step, of which it serves a part. With
passages that are retrieved as text, every rank retrieves those of all conversations, as their lengths decide.

A conversation has the positions of its place in the sequence, as a document of pretraining has.
"""
import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from configurator import UserError
from data.chunking import chunk_hashes, hash64
from data.conversations import cut_passages, find_template, read_conversations, render
from data.documents import Counts
from data.stream import Batch, shuffle
from data.tokenizer import tokenize

WINDOW = 64  # conversations that wait for a place
PROBED = 2000  # conversations that the share of padding is estimated from
ANSWER_SHARE = 4  # passages leave a quarter of the block to what follows the prompt, however long the answer is
SHORTEST = 16  # tokens of a question that stay when its beginning is cut
CUTS = {'passages': 'text of passages', 'turns': 'earlier turns', 'system': 'the message of the system',
        'question': 'the beginning of the question', 'answer': 'the end of the answer'}  # in the order of cutting


@dataclass
class Example:
    """A conversation of n tokens as it is trained on."""
    tokens: np.ndarray  # (n,) int32
    is_answer: np.ndarray  # (n,) bool, the tokens to predict
    doc_id: int
    chunk_ids: np.ndarray  # (L,) int64
    passages: list = field(default_factory=list)  # what cross-attention and pointers read, as arrays of tokens
    cuts: Counter = field(default_factory=Counter)  # tokens, by what was cut


def question_of(messages):
    """The last user's turn, for which passages are retrieved; the last message, if no user speaks."""
    return next((m['content'] for m in reversed(messages) if m['role'] == 'user'), messages[-1]['content'])


def cut_of(*examples):
    """What was cut of Examples, in words."""
    count, tokens = Counter(kind for e in examples for kind in e.cuts), sum((e.cuts for e in examples), Counter())
    return ', '.join(f'{CUTS[kind]}' + f' of {count[kind]:,}' * (len(examples) > 1) + f' ({tokens[kind]:,} tokens)'
                     for kind in CUTS if count[kind])


class Writer:
    """Writes Conversations as Examples of up to block_size tokens, by the settings of a run."""

    def __init__(self, settings, tokenizer):
        self.template, self.tokenizer = find_template(settings.template), tokenizer
        self.block_size, self.chunk_size = settings.block_size, settings.retrieval_chunk_size
        reads = settings.use_retrieval and settings.retrieval_k_neighbors > 0
        self.align = self.chunk_size if reads else 0
        self.kind, self.count = settings.passages, settings.num_passages

    def describe(self):
        """Plain values that decide how a conversation is written."""
        return [self.template, self.block_size, self.chunk_size, self.align, self.kind, self.kind and self.count]

    def write(self, conversation, passages):
        """The Example of a Conversation with its Passages. UserError if the block is too short for any answer."""
        passages = list(passages)[:self.count] if self.kind else []
        messages, in_prompt = list(conversation.messages), passages if self.kind == 'prompt' else []
        while messages[-1]['role'] != 'assistant':  # nothing answers it
            messages.pop()
        tokens, is_answer, cuts = self._fit(messages, in_prompt)
        given = [tokenize(p.text, self.tokenizer) for p in passages if self.kind == 'neighbors']
        ids = chunk_hashes('conversation', conversation.id, 0, -(-len(tokens) // self.chunk_size))
        return Example(tokens.astype(np.int32), is_answer, conversation.doc_id, ids, [g for g in given if len(g)], cuts)

    def _render(self, messages, passages):
        return render(self.template, messages, self.tokenizer, passages, self.align)

    def _fit(self, messages, passages):
        """Tokens and is_answer, up to block_size of them, and how many were cut of what, as CUTS orders it."""
        cuts = Counter()
        tokens, is_answer = self._render(messages, passages)
        for kind in CUTS:
            while (excess := self._excess(kind, tokens, is_answer)) > 0:
                if kind == 'answer':
                    tokens, is_answer = tokens[:-excess], is_answer[:-excess]
                    cuts[kind] += excess
                    break
                shorter = self._shorten(kind, messages, passages, excess)
                if shorter is None:
                    break
                messages, passages = shorter
                before = len(tokens)
                tokens, is_answer = self._render(messages, passages)
                cuts[kind] += before - len(tokens)
        if not is_answer.any():
            raise UserError(f'block_size {self.block_size} has no room for an answer behind the marks of the template: '
                            f'raise it')
        return tokens, is_answer, +cuts

    def _excess(self, kind, tokens, is_answer):
        """
        How many tokens of a kind are too many. If passages filled the block up to the answer, where it begins would
        tell how long it is, which nothing tells when it is to be written.
        """
        excess = len(tokens) - self.block_size
        if kind == 'passages':
            excess = max(excess, int(is_answer.argmax()) - self.block_size + self.block_size // ANSWER_SHARE)
        return excess

    def _shorten(self, kind, messages, passages, excess):
        """(messages, passages) with less of a kind, about `excess` tokens where it can be cut anywhere; or None."""
        first = next((i for i, m in enumerate(messages) if m['role'] == 'assistant'), None)
        if kind == 'passages' and passages:
            return messages, cut_passages(passages, excess, self.tokenizer)
        if kind == 'turns' and any(m['role'] == 'assistant' for m in messages[first + 1:]):
            return [m for m in messages[:first + 1] if m['role'] == 'system'] + messages[first + 1:], passages
        if kind == 'system' and messages[0]['role'] == 'system':
            return messages[1:], passages
        if kind == 'question':
            place = next((i for i, m in enumerate(messages) if m['role'] == 'user'
                          and len(tokenize(m['content'], self.tokenizer)) > SHORTEST), None)
            if place is not None:
                tokens = tokenize(messages[place]['content'], self.tokenizer)
                kept = tokens[min(excess, len(tokens) - SHORTEST):]
                text = self.tokenizer.decode(kept.tolist()).lstrip('\ufffd').strip() or '…'
                if len(text) >= len(messages[place]['content']):
                    return None
                return [*messages[:place], dict(role='user', content=text), *messages[place + 1:]], passages
        return None


class ConversationSet:
    """
    The conversations of a DatasetConfig, all in memory, in the order of their hashes. They are written once, unless
    their passages are retrieved: then when they are drawn. UserError if there are none, or one is bad.
    """

    def __init__(self, config, writer, settings, say=print):
        self.config, self.writer, self.counts, self.say = config, writer, Counts(), say
        self.live = settings.passages != '' and settings.passages_from == 'collection'
        found = {}
        for conversation in read_conversations(config, self.counts):
            content = json.dumps([conversation.messages, [[p.title, p.text] for p in conversation.passages]])
            found.setdefault((conversation.doc_id, hash64(content)), conversation)
        self.counts.duplicates = self.counts.documents - len(found)
        self.counts.documents = len(found)
        self.hash = f'{hash64(writer.describe(), self.live, *sorted(found)) & (2**64 - 1):016x}'
        self.contents = {key[1] for key in found}
        self.conversations, self.cut = [found[key] for key in sorted(found)], 0  # that were cut when they were drawn
        if settings.passages and not self.live and not any(c.passages for c in self.conversations):
            raise UserError(f"passages is {settings.passages!r}, and no conversation of {config.path!r} has ctxs: "
                            f"retrieve some with passages_from='collection', or leave passages out")
        self.examples = [writer.write(c, c.passages) for c in self.conversations] if not self.live else None
        self.without = sum(not c.passages for c in self.conversations)
        for conversation in self.conversations:
            conversation.passages = []  # there may be much text in them, which is in the examples or not wanted

    def __len__(self):
        return len(self.conversations)

    def read(self, numbers, find_passages=None):
        """The Examples of these numbers, as a list. find_passages is that of a PassageFinder."""
        if not self.live:
            return [self.examples[i] for i in numbers]
        chosen = [self.conversations[i] for i in numbers]
        passages = find_passages([question_of(c.messages) for c in chosen], [c.doc_id for c in chosen])
        examples = [self.writer.write(c, p) for c, p in zip(chosen, passages, strict=True)]
        for conversation, example in zip(chosen, examples, strict=True):
            if example.cuts:
                self.cut += 1
                if self.cut & (self.cut - 1) == 0:  # said again whenever there are twice as many
                    self.say(f'{self.config.path}: {self.cut:,} of the conversations drawn so far are longer than '
                             f'block_size {self.writer.block_size}; of {conversation.id!r} was cut {cut_of(example)}')
        return examples

    def describe(self):
        """Lines that say what there is, and what was cut."""
        if self.live:
            return [f'{self.config.path}: {self.counts.describe().replace("documents", "conversations")}; their '
                    f'passages are retrieved as they are drawn']
        tokens, answers = (sum(map(int, values)) for values in zip(
            *((len(e.tokens), e.is_answer.sum()) for e in self.examples), strict=True))
        lines = [f'{self.config.path}: {self.counts.describe().replace("documents", "conversations")}, {tokens:,} '
                 f'tokens, of which {answers:,} are of answers'
                 + f'; {self.without:,} have no passages' * bool(self.writer.kind and self.without)]
        cut = [(c.id, example) for c, example in zip(self.conversations, self.examples, strict=True) if example.cuts]
        if cut:
            lines.append(f'{self.config.path}: {len(cut):,} of {len(self):,} conversations are longer than block_size '
                         f'{self.writer.block_size}, such as {cut[0][0]!r}; cut is {cut_of(*(e for _, e in cut))}')
        return lines


class ConversationStream:
    """
    An endless iterator of Batch, as SequenceStream, from ConversationSets. find_passages is that of a PassageFinder,
    if passages are retrieved. UserError when all datasets have been read as often as their epochs say.
    """

    def __init__(self, datasets, block_size, batch_size, step_size=None, first=0, count=None, seed=0, state=None,
                 find_passages=None):
        self.datasets, self.batch_size, self.seed, self.find_passages = datasets, batch_size, seed, find_passages
        self.step_size, self.first = step_size or batch_size, first
        self.count = count or self.step_size
        self.chunk_size = datasets[0].writer.chunk_size
        self.chunks = block_size // self.chunk_size
        weights = np.array([dataset.config.weight for dataset in datasets], dtype=float)
        self.shares = weights / weights.max() / (weights / weights.max()).sum()
        self.served = 0  # of this step's `count`
        self.taken, self.waiting = np.zeros(len(datasets), dtype=np.int64), []  # [(dataset, number), Example]
        if state is not None:
            check_state(state, self)
            self.taken[:] = state['taken']
            self.waiting = read_together(datasets, [tuple(key) for key in state['waiting']], find_passages)

    def state(self):
        """Plain values that a new stream goes on from, of whole steps."""
        return dict(taken=self.taken.tolist(), waiting=[list(key) for key, _ in self.waiting], seed=self.seed,
                    datasets=self.describe_datasets())

    def describe_datasets(self):
        return [[dataset.hash, len(dataset), dataset.config.weight] for dataset in self.datasets]

    def _draw(self, count):
        """The next (dataset, number) of the blend, up to `count`: fewer if all datasets have ended."""
        drawn, has_ended = [], np.zeros(len(self.datasets), dtype=bool)
        while len(drawn) < count and not has_ended.all():
            # the one that is furthest behind its share, whatever the shares of those that have ended
            dataset = int(np.where(has_ended, np.inf, (self.taken + 0.5) / self.shares).argmin())
            most = self.datasets[dataset].config.epochs * len(self.datasets[dataset])
            if most and self.taken[dataset] >= most:
                has_ended[dataset] = True
                continue
            epoch, place = divmod(int(self.taken[dataset]), len(self.datasets[dataset]))
            number, = shuffle(np.array([place]), len(self.datasets[dataset]), [self.seed, dataset, epoch])
            drawn.append((dataset, int(number)))
            self.taken[dataset] += 1
        return drawn

    def pack_step(self):
        """The next step's sequences: lists of Examples."""
        bins, room = [[] for _ in range(self.step_size)], [Room(self.chunks) for _ in range(self.step_size)]
        while True:
            new = self._draw(WINDOW - len(self.waiting))
            self.waiting = self.waiting + read_together(self.datasets, new, self.find_passages)
            left = []
            for key, example in self.waiting:
                place = next((i for i in range(self.step_size) if room[i].takes(example)), None)
                if place is None:
                    left.append((key, example))
                else:
                    room[place].take(example)
                    bins[place].append(example)
            if len(left) == len(self.waiting):
                break
            self.waiting = left
        if not any(bins):
            raise UserError(f'train_datasets are used up, after {self.taken.sum():,} conversations: all have been read '
                            f'as often as their epochs say; raise these, leave them at 0, or lower max_iters')
        return bins

    def estimate_padding(self):
        """The share of sequences that no conversation fills, of the first ones; None if passages are to be found."""
        if any(dataset.live for dataset in self.datasets):
            return None
        bins, before = [], (self.taken.copy(), self.waiting)
        with suppress(UserError):  # their epochs may end
            while self.taken.sum() - before[0].sum() < PROBED:
                bins += self.pack_step()
        self.taken, self.waiting = before
        return padding_of(bins, self.chunks * self.chunk_size) if bins else None

    def __iter__(self):
        return self

    def __next__(self):
        if self.served == 0:
            self.bins = self.pack_step()[self.first:self.first + self.count]
        batch = as_batch(self.bins[self.served:self.served + self.batch_size], self.chunks, self.chunk_size,
                         self.datasets[0].writer.tokenizer.eot_token)
        self.served += self.batch_size
        if self.served >= self.count:
            self.served, batch.state = 0, self.state()
        return batch


class Room:
    """What a sequence can still take."""

    def __init__(self, chunks):
        self.chunks, self.documents = chunks, set()

    def takes(self, example):
        return len(example.chunk_ids) <= self.chunks and example.doc_id not in self.documents

    def take(self, example):
        self.chunks -= len(example.chunk_ids)
        self.documents.add(example.doc_id)


def check_state(state, stream):
    """UserError if a ConversationStream cannot go on from the state of a checkpoint."""
    if 'waiting' not in state:
        raise UserError('the checkpoint was trained on documents, and template says that the data are conversations: '
                        'tune its weights in another out_dir, by --init_from=FOLDER')
    if state['datasets'] != stream.describe_datasets():
        raise UserError(f'the checkpoint was made with other train_datasets, another template or other passages: hash, '
                        f'conversations and weight were {state["datasets"]}, and are now {stream.describe_datasets()}; '
                        f'resume with the same ones')
    if state['seed'] != stream.seed:
        raise UserError(f'the checkpoint was made with seed {state["seed"]}, and the run has {stream.seed}: the '
                        f'conversations would come in another order; keep the seed when resuming')


def padding_of(bins, block_size):
    """The share of sequences, lists of Examples, that no conversation fills."""
    return 1 - sum(len(example.tokens) for line in bins for example in line) / (len(bins) * block_size)


def as_batch(bins, chunks, chunk_size, end_of_text):
    """Sequences of `chunks` chunks, lists of Examples, as a Batch; what they leave is padding, of no document."""
    B, T = len(bins), chunks * chunk_size
    batch = Batch(np.full((B, T), end_of_text, dtype=np.int64), np.full((B, T), -1, dtype=np.int64),
                  np.zeros((B, chunks), dtype=np.int64), np.zeros((B, chunks), dtype=np.int64),
                  np.ones((B, chunks), dtype=bool), given=[[] for _ in bins])
    for b, line in enumerate(bins):
        start = 0  # chunk
        for example in line:
            n, end, first = len(example.tokens), start + len(example.chunk_ids), start * chunk_size
            batch.tokens[b, first:first + n] = example.tokens
            batch.targets[b, first:first + n - 1] = np.where(example.is_answer[1:], example.tokens[1:], -1)
            batch.doc_ids[b, start:end], batch.chunk_ids[b, start:end] = example.doc_id, example.chunk_ids
            batch.is_last_chunk[b, start:end - 1] = False
            batch.given[b].append((start, end, example.passages))
            start = end
    return batch


def val_conversations(datasets, block_size, batch_size, max_tokens, rank=0, world_size=1, find_passages=None):
    """
    This rank's Batches of the held-out conversations of ConversationSets, up to max_tokens, where 0 means all. All
    ranks have as many, of batch_size sequences each.
    """
    chunk_size, end_of_text = datasets[0].writer.chunk_size, datasets[0].writer.tokenizer.eot_token
    order = sorted((hash64(c.doc_id, c.id), d, i) for d, dataset in enumerate(datasets)
                   for i, c in enumerate(dataset.conversations))
    bins, room, total = [], [], 0
    for start in range(0, len(order), WINDOW):
        for _, example in read_together(datasets, [key[1:] for key in order[start:start + WINDOW]], find_passages):
            total += len(example.tokens)
            if max_tokens and total > max_tokens and bins:
                break
            recent = range(max(0, len(bins) - WINDOW), len(bins))
            place = next((i for i in recent if room[i].takes(example)), None)
            if place is None:
                place = len(bins)
                bins.append([])
                room.append(Room(block_size // chunk_size))
            room[place].take(example)
            bins[place].append(example)
        if max_tokens and total > max_tokens:
            break
    share = padding_of(bins, block_size)
    bins += [[] for _ in range(-len(bins) % (batch_size * world_size))]
    bins = bins[rank::world_size]
    return [as_batch(bins[start:start + batch_size], block_size // chunk_size, chunk_size, end_of_text)
            for start in range(0, len(bins), batch_size)], share


def read_together(datasets, keys, find_passages):
    """[(key, Example)] of (dataset, number) keys, with one search for the passages of each dataset's."""
    examples = {}
    for dataset in sorted({dataset for dataset, _ in keys}):
        numbers = sorted({number for other, number in keys if other == dataset})
        for number, example in zip(numbers, datasets[dataset].read(numbers, find_passages), strict=True):
            examples[dataset, number] = example
    return [(key, examples[key]) for key in keys]
