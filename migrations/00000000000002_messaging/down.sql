DROP TABLE dead_letter;
DROP TABLE attempt;
DROP TABLE outbox;
