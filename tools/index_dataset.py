#!/usr/bin/env python3
"""Tokenise text into an index: `megazh index build` as an offline tool, alone, under mpirun or under srun.

python tools/index_dataset.py --input 'raw/*.jsonl.zst' --text-key text --tokenizer TOK --output data_index/wiki
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from megazh.cli import index, run
    from megazh.cli.options import standalone
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run 'bash jobs/setup.sh' once, then use .venv/bin/python (or activate .venv)")

if __name__ == "__main__":
    parser = standalone("tokenise text into PREFIX.bin and PREFIX.idx", index.BUILD_EXAMPLES)
    index.add_build_options(parser)
    sys.exit(run(parser.parse_args()))
