"""
Conversations with a tuned model: a user's question becomes the prompt that the model was tuned to answer, written by
the checkpoint's template, with passages where it was tuned with them: as text in the prompt, or in the collection's
place.

    chat = Chat(settings, model.config, tokenizer)
    prompt = chat.prompt(messages, 256, passages, source)
    engine.add(Request(prompt.tokens, stop=chat.template.stop, align='start', source=prompt.source))
"""
from bisect import bisect_left
from dataclasses import dataclass, field

from configurator import UserError
from data.conversation_stream import ANSWER_SHARE
from data.conversations import cut_passages, find_template, render
from generation.sources import PassageSource


class TooLong(UserError):
    """A question that does not fit the model's window."""


@dataclass
class Prompt:
    """What is to be continued, and what it is continued from."""
    tokens: list
    text: str | None = None  # that the tokens are of, if it was given as one
    source: object = None  # of neighbors and pointers (sources.py)
    passages: list = field(default_factory=list)  # of Passage: those that a question was given
    dropped: int = 0  # messages that were left out, the oldest ones, since not all fit
    cut: int = 0  # passages that lost their end, or were left out, for the same reason


class Chat:
    """The template and passages of a checkpoint that was tuned to answer. UserError if it was not."""

    def __init__(self, settings, config, tokenizer):
        if not settings.template:
            raise UserError('the model continues texts and was not tuned to answer: tune it with sft.py, or give a '
                            '--template, such as plain')
        self.template = find_template(settings.template)
        self.config, self.tokenizer = config, tokenizer
        self.in_prompt = settings.passages == 'prompt'  # passages are text before the question
        self.in_place = settings.passages == 'neighbors'  # they are read in place of the collection
        is_live = config.use_retrieval or settings.passages_from == 'collection'
        self.count = settings.num_passages if settings.passages and is_live else 0  # to retrieve for a question
        if config.has_neighbors and not self.in_prompt:
            self.count = min(self.count, config.retrieval_k_neighbors)
        self.align = min(config.retrieval_chunk_size, config.block_size) if config.has_neighbors else 0

    def prompt(self, messages, max_new_tokens, passages=(), source=None):
        """
        The Prompt of messages, [{'role', 'content'}], the last of which is a user's. Passages that are not text before
        the question are read in place of `source`. What the window has no room for is left out as in tuning, the end of
        the passages first, then the oldest turns. TooLong if the last turn alone does not fit, UserError if there are
        more passages than the model takes.
        """
        passages = list(passages)
        room = self.config.block_size - min(max_new_tokens, self.config.block_size // ANSWER_SHARE)
        tokens, shown, dropped = self._fit(messages, passages if self.in_prompt else [], room)
        if passages and not self.in_prompt:
            source = PassageSource(self.config, self.tokenizer, [passage.text for passage in passages])
        cut = sum(passage not in shown for passage in passages) if self.in_prompt else 0
        return Prompt(tokens, None, source, shown if self.in_prompt else passages, dropped, cut)

    def _fit(self, messages, passages, room):
        """The tokens of a prompt of up to `room` tokens, its passages, and the number of messages left out."""
        system = [message for message in messages[:1] if message['role'] == 'system']
        turns = messages[len(system):]
        starts = [i for i, message in enumerate(turns) if message['role'] == 'user' or not i]

        def write(first, passages):
            return render(self.template, system + turns[first:], self.tokenizer, passages, self.align)[0]
        while passages and len(tokens := write(0, passages)) > room:
            passages = cut_passages(passages, len(tokens) - room, self.tokenizer)
        number = bisect_left(starts, True, hi=len(starts) - 1, key=lambda i: len(write(i, passages)) <= room)
        dropped = starts[number]
        tokens = write(dropped, passages)
        if len(tokens) > room:
            raise TooLong(f'the question has {len(tokens):,} tokens with its system message, and {room:,} of the '
                          f"model's window of {self.config.block_size:,} are free for it: shorten it")
        return tokens.tolist(), passages, dropped
