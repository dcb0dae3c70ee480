"""What is trained and asked: a data file becomes examples, and a template turns each into text around an answer.

- `load`: any data file -> Dataset, and holding a part of one out
- `squad`, `pairs`, `classification`: the three kinds of files
- `template`: Example -> prompt, invocation, target; generated text -> answer
"""

from typing import Literal

Kind = Literal["squad", "pairs", "classification"]
