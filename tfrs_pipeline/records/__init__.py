"""What service writes, in SQLite beside a model's versions: users' events, answers, live items."""
