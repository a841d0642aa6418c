"""Generate from Python without a server. All prompts run together and share what they have in common."""

import sys

from stemcache import Engine, SamplingParams
from stemcache.engine.demo import MODEL_PATH

DOCUMENT = "The code of Velmora is 7392. The keeper of Velmora is Drasten. The colour of Velmora is teal. " * 3

with Engine.load(sys.argv[1] if len(sys.argv) > 1 else MODEL_PATH) as engine:
    prompts = [DOCUMENT + start for start in ("The code of", "The keeper of", "The colour of")]
    for completion in engine.generate(prompts, SamplingParams(max_tokens=12, temperature=0)):
        usage = completion.usage
        print(f"{completion.text!r}, {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were cached")
