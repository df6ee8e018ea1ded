"""Train the RankGen that ships with Echelon.

    ECHELON_DATA=... python embedded/rankgen/train.py --work RUN_DIR

The same as ``echelon train --method rankgen`` with the knobs of config.yaml, over all works that are not held out. Kill it at any
moment and run the same command: it goes on.
"""

import argparse
import json
import os
from pathlib import Path

import yaml

from echelon.train import RankGenTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "config.yaml")
    parser.add_argument("--work", type=Path, required=True, help="folder for rows, log, checkpoint and result")
    args = parser.parse_args()
    config = yaml.safe_load(args.config.read_text())
    works = [Path(os.environ["ECHELON_DATA"]) / name for name in config["data"]]
    args.work.mkdir(parents=True, exist_ok=True)
    corpus = args.work / "corpus.jsonl"
    if not corpus.exists():
        corpus.write_text("".join(path.read_text() for path in works))
    knobs = config["knobs"] | {"suffix_words": tuple(config["knobs"]["suffix_words"])}
    trainer = RankGenTrainer(**knobs)
    result = trainer.train(config["model"], corpus, args.work, config["seed"], lambda entry: print(json.dumps(entry), flush=True))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
