"""Publish a model folder on the Hugging Face Hub: weights, code, image processor, card, figures and results.

    python publish.py --model DIR --repo-id USER/NAME --results RESULTS_DIR
    python publish.py --model DIR --repo-id USER/NAME --dry-run FOLDER

The token comes from `hf auth login` or HF_TOKEN; it is never printed or written.
"""

import argparse
import sys


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="folder with the model and its image processor")
    add("--repo-id", required=True, metavar="USER/NAME", help="Hub id; an organisation's is ORGANISATION/NAME")
    add("--results", metavar="DIR", help="output folder of `python -m evaluation`: table, model-index, figures")
    add("--example", metavar="IMAGE", help="photo that the model card shows explained")
    add("--no-figures", action="store_true", help="leave out the evaluation's pictures, which show its images")
    add("--base-model", nargs="+", default=[], metavar="ID", help="Hub id of the pretrained classifier")
    add("--license", metavar="ID", help="licence of the backbone's weights, e.g. apache-2.0")
    add("--datasets", nargs="+", default=[], metavar="ID", help="data that the stream was trained on")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    visibility.add_argument("--public", dest="private", action="store_false", help="make a new repository public")
    add("--revision", metavar="BRANCH", help="branch to commit to, created where needed; default: main")
    add("--create-pr", action="store_true", help="open a pull request instead of committing")
    add("--space", action="store_true", help="also write the Space: a page that explains images with this model")
    add("--max-shard-size", default="5GB", metavar="SIZE", help="split weights beyond this; default: %(default)s")
    add(
        "--dry-run",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="write the folder instead of uploading it; default: NAME-publication",
    )
    return parser


def main(arguments: list[str] | None = None, prog: str = "publish.py") -> int:
    """Run the command; returns the exit status."""
    options = build_parser(prog).parse_args(arguments)
    from castream.publishing import PublishError, publish  # here, so that --help is quick

    dry_run = options.dry_run
    if dry_run == "":
        dry_run = f"{options.repo_id.split('/')[-1]}-publication"
    try:
        published = publish(
            options.model,
            options.repo_id,
            results_dir=options.results,
            private=options.private,
            revision=options.revision,
            create_pr=options.create_pr,
            space=options.space,
            dry_run=dry_run,
            max_shard_size=options.max_shard_size,
            base_model=options.base_model,
            license=options.license,
            datasets=options.datasets,
            example=options.example,
            figures=not options.no_figures,
        )
    except (ValueError, OSError, PublishError) as error:
        print(f"publish: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    for path, size in published.files:
        print(f"{size:>12,}  {path}")
    print(f"Loaded in a fresh process without castream; largest difference {published.difference:.1e}.")
    print(f"{'Written to' if dry_run is not None else 'Published:'} {published.url}")
    if published.space_url:
        print(f"Page: {published.space_url}")
    return 0
