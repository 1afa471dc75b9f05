"""What finished unlearning runs did and how well, as one page that needs no network, as Markdown and as CSV."""
