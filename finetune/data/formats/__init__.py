"""The forms that rows have, one file each. A new one is one more file, one more entry here, and its tests."""

from finetune.data.formats.base import Format as Format
from finetune.data.formats.messages import Messages
from finetune.data.formats.template import Columns

# in the order in which rows are tried; the last takes all that no other recognises
FORMATS: dict[str, type[Format]] = {kind.NAME: kind for kind in (Messages, Columns)}
