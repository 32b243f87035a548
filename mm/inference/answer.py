"""What the engine keeps of a request: before it has a row, and while it has one."""

from dataclasses import dataclass, field

from mm.inference.joint_ctc import CtcBias
from mm.inference.prompt import Prompt
from mm.inference.request import Request
from mm.inference.rows import PromptRow
from mm.inference.state import RowPages


@dataclass(eq=False)
class Answer:
    """A request that has a row.

    Attributes:
        row: of the state.
        budget: tokens that may be drawn.
        prompt_row: its pages, and how far the prompt's pass is.
        leader: an answer to the same prompt, whose pass serves this one as well.
        drawn: tokens that launched steps have drawn, if the answer does not end before.
        ctc: CTC's part of a transcript.
        pages: what its steps read.
        wanted: False once it has been cancelled.
    """

    number: int
    request: Request
    row: int
    budget: int
    prompt_row: PromptRow
    leader: "Answer | None" = None
    drawn: int = 0
    received: int = 0
    ctc: CtcBias | None = None
    pages: RowPages | None = field(default=None, repr=False)
    wanted: bool = True

    @property
    def follows_tokens(self) -> bool:
        """Whether what its next step may draw depends on the token before."""
        return self.ctc is not None or self.request.mask is not None

    def needs_sounds(self, count: int) -> bool:
        """Whether the sounds have yet to be encoded, for the next `count` tokens of the prompt or for CTC."""
        return self.prompt_row.needs_audio(count) or (self.request.joint_ctc and self.ctc is None)


@dataclass
class Waiting:
    """A request that has no row yet; its prompt is prepared when it is the first in the queue."""

    number: int
    request: Request
    budget: int
    prompt: Prompt | None = field(default=None, repr=False)
