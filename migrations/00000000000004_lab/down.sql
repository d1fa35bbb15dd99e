DROP TABLE balance_delivery;
DROP TABLE user_balance;
