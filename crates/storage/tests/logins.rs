//! Logins are unique among those who aren't deleted, and asking for one that is taken is no error of the server.

use domain::{
    UserId,
    values::{Contact, Email, Login},
};
use std::{sync::mpsc, thread};
use storage::{
    Error, PgConnection, Result,
    users::{self, NewUser},
};
use test_support::{TestDatabase, eventually};

fn login(text: &str) -> Login {
    Login::parse(text).unwrap()
}

fn create(conn: &mut PgConnection, text: &str) -> Result<UserId> {
    let contact = Contact::Email(Email::parse("a@example.com").unwrap());
    let new =
        NewUser { login: &login(text), contact: &contact, password_hash: None, age: None, is_active: true, roles: &[] };
    Ok(users::create(conn, &new)?.id)
}

fn is_taken<T>(result: &Result<T>) -> bool {
    matches!(result, Err(Error::Taken("login")))
}

#[test]
fn a_login_that_is_taken_leaves_the_transaction_usable() {
    let db = TestDatabase::new();
    db.database()
        .transaction(|conn| {
            let (ann, bob) = (create(conn, "ann")?, create(conn, "bob")?);
            assert!(is_taken(&create(conn, "ann")));
            assert!(is_taken(&users::rename(conn, bob, &login("ann"))));
            assert!(matches!(users::rename(conn, UserId(999_999), &login("ann")), Err(Error::NotFound("user"))));
            users::rename(conn, ann, &login("ann"))?;
            users::delete(conn, ann)?;
            users::rename(conn, bob, &login("ann"))?;
            assert_eq!(users::by_login(conn, "ann")?.id, bob);
            assert!(is_taken(&create(conn, "ann")));
            create(conn, "bob")
        })
        .unwrap();
}

#[test]
fn of_two_who_take_a_login_at_the_same_time_the_later_is_told() {
    let db = TestDatabase::new();
    let [ann, bob] = ["ann", "bob"].map(|name| db.database().transaction(|conn| create(conn, name)).unwrap());
    for name in ["renamed", "made"] {
        let (taken, go_on) = mpsc::channel();
        thread::scope(|scope| {
            let first = scope.spawn(|| {
                db.database().transaction(|conn| {
                    users::rename(conn, ann, &login(name))?;
                    taken.send(()).unwrap();
                    let waiting =
                        "SELECT count(*) AS n FROM pg_locks l JOIN pg_database d ON d.datname = current_database()
                                   WHERE NOT l.granted AND (l.database = d.oid OR l.locktype = 'transactionid')
                                     AND l.pid IN (SELECT pid FROM pg_stat_activity WHERE datid = d.oid)";
                    eventually("the other waits", || (db.count(waiting) > 0).then_some(()));
                    Ok(())
                })
            });
            go_on.recv().unwrap();
            let second = match name {
                "renamed" => db.database().transaction(|conn| users::rename(conn, bob, &login(name))),
                _ => db.database().transaction(|conn| create(conn, name).map(|_| ())),
            };
            assert!(is_taken(&second), "{name}: {second:?}");
            first.join().unwrap().unwrap();
        });
    }
}
