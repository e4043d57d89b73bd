"""Sequence-length warm-up: training begins with short documents, which grow (2108.06084).

Composer's SeqLengthWarmup shortens the rows of a batch. Here rows keep their shape, for which
kernels are built, and every token stays: documents in them are cut into pieces, which see each
other as little as documents do, so that attention costs less and nothing is thrown away. The first
token of a piece is no label, as nothing comes before it.
"""

from typing import Any

import torch
from composer.core import Algorithm, Event, State, TimeUnit
from composer.loggers import Logger


class LengthWarmup(Algorithm):
    """Cuts the documents of training batches into pieces of a length that grows in even steps.

    It follows from the place in the run alone, so that a resumed run goes on exactly. Lengths are
    tokens; `duration` is the share of the run after which documents are whole.
    """

    def __init__(
        self, duration: float, min_seq_length: int, step_size: int, max_seq_length: int
    ) -> None:
        self.duration, self.step = duration, step_size
        self.shortest, self.longest = min_seq_length, max_seq_length

    def match(self, event: Event, state: State) -> bool:
        return event == Event.AFTER_DATALOADER

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        elapsed = float(state.get_elapsed_duration())
        if state.max_duration.unit == TimeUnit.EPOCH:  # which elapse by the step too
            of_epoch = state.timestamp.batch_in_epoch.value / state.dataloader_len.value
            elapsed += of_epoch / state.max_duration.value
        length = self.length(elapsed)
        if length < self.longest:
            state.batch = cut_documents(state.batch, length)
        logger.log_metrics({"overture/seq_length": length})

    def length(self, elapsed: float) -> int:
        """Return the tokens of a piece when a share of the run is over."""
        share = elapsed / self.duration + 1e-9  # a step that ends it is not to fall short of one
        grown = int(share * (self.longest - self.shortest)) // self.step * self.step
        return self.longest if share >= 1 else min(self.shortest + grown, self.longest)


def cut_documents(batch: dict[str, Any], length: int) -> dict[str, Any]:
    """Return a batch of `TokenCollator` whose documents have at most `length` tokens each."""
    starts, labels = batch["document_starts"].long(), batch["labels"]
    places = torch.arange(starts.shape[1])
    is_token, depth = starts >= 0, places - starts  # how much of its document is before a token
    begins = is_token & (depth % length == 0)
    starts = torch.where(is_token, places - depth % length, -1)
    labels = torch.where(begins, -100, labels)
    pieces, sizes = begins.sum(1), is_token.sum(1)
    # As the collator has it: padding is a document of its own, unless there is but one.
    rest = torch.where(pieces > 1, sizes, 0)[:, None]
    longest = (depth % length + 1).where(is_token, len(places) - sizes[:, None])
    return batch | {
        "labels": labels, "document_starts": starts.to(torch.int32),
        "position_ids": places - torch.where(is_token, starts, rest),
        "num_labels": (labels != -100).sum(1).tolist(),
        "num_spans": (pieces + (sizes < len(places))).tolist(), "longest": longest.amax(1).tolist(),
    }  # fmt: skip
