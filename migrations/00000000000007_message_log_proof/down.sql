DROP TRIGGER message_partition_goes_on ON message_partition;
DROP FUNCTION message_partition_goes_on();
ALTER TABLE message_partition DROP COLUMN lineage, DROP COLUMN unproven_upto;
DROP FUNCTION message_lineage();
DROP FUNCTION message_unused_among(integer, bigint, bigint);
DROP TABLE message_unused;
DROP TABLE message_epoch;
