//! What becomes of an order to import followers.

use domain::{
    ImportId, UserId,
    message::{AddFollowers, Message as _},
    topology::queue,
    values::{Channel, ImportPlan},
};
use follower_importer::Importer;
use storage::{imports, users};
use test_support::TestDatabase;
use worker::{
    Received,
    testing::{self, Handled},
};

/// Users made in one transaction, and the most that an import may ask for.
const STEP: u32 = 3;
const LIMIT: u32 = 20;

struct Stage {
    db: TestDatabase,
    author: UserId,
}

impl Stage {
    fn new() -> Self {
        let db = TestDatabase::new();
        let author = db.user("author", Channel::Email);
        Self { db, author }
    }

    fn handle(&self, messages: impl IntoIterator<Item = Received>) -> Handled {
        testing::handle(&mut Importer::new(self.db.database().clone(), STEP, LIMIT), messages)
    }

    /// An order as the gateway gives it, with the import that keeps the progress.
    fn order(&self, prefix: &str, count: i64) -> (ImportId, AddFollowers) {
        let plan = ImportPlan::new(prefix, count, LIMIT).expect("a plan");
        let open = self.db.database().transaction(|conn| imports::open(conn, prefix, self.author, &plan));
        let id = open.expect("the author is there").id;
        (id, AddFollowers { user_id: self.author, follower_login: prefix.into(), count, import_id: Some(id) })
    }

    fn foreign(&self, prefix: &str, count: i64) -> AddFollowers {
        AddFollowers { user_id: self.author, follower_login: prefix.into(), count, import_id: None }
    }

    /// State, users made, logins skipped.
    fn import(&self, id: ImportId) -> (String, i32, i32) {
        let import = imports::get(&mut self.db.database().connection().unwrap(), id).expect("the import is there");
        (import.state, import.created, import.skipped)
    }

    fn followers(&self) -> i64 {
        self.db.count("SELECT count(*) AS n FROM subscription")
    }
}

fn received(order: &AddFollowers) -> Received {
    Received::of(queue::ADD_FOLLOWERS, order.envelope())
}

#[test]
fn users_are_made_step_by_step_and_follow() {
    for count in [1, 3, 7] {
        let stage = Stage::new();
        let (id, order) = stage.order("fan", count);
        let handled = stage.handle([received(&order)]);
        assert!(handled.is_done() && handled.published.is_empty(), "{handled:?}");
        assert_eq!(stage.import(id), ("done".into(), i32::try_from(count).unwrap(), 0));
        assert_eq!(stage.followers(), count);
        let logins = format!("SELECT count(*) AS n FROM \"user\" WHERE login IN ('fan_0', 'fan_{}')", count - 1);
        assert_eq!(stage.db.count(&logins), count.min(2), "from 0 on");
    }
}

#[test]
fn a_second_time_changes_nothing() {
    let stage = Stage::new();
    let (id, order) = stage.order("fan", 5);
    let foreign = stage.foreign("other", 4);
    for _ in 0..2 {
        assert!(stage.handle([received(&order), received(&foreign)]).is_done());
    }
    let mut again = received(&foreign);
    again.message_id = None;
    assert!(stage.handle([again]).is_done());
    assert_eq!((stage.import(id), stage.followers()), (("done".into(), 5, 0), 9));
}

#[test]
fn an_import_that_was_interrupted_goes_on_where_it_was() {
    let stage = Stage::new();
    let (id, order) = stage.order("fan", 7);
    stage.db.database().transaction(|conn| imports::step(conn, id, STEP)).expect("a step");
    assert_eq!(stage.followers(), i64::from(STEP));
    assert!(stage.handle([received(&order)]).is_done());
    assert_eq!((stage.import(id), stage.followers()), (("done".into(), 7, 0), 7));
}

#[test]
fn logins_of_others_are_skipped_and_stay_theirs() {
    let stage = Stage::new();
    stage.db.user("fan_1", Channel::Phone);
    let (id, order) = stage.order("fan", 3);
    assert!(stage.handle([received(&order)]).is_done());
    assert_eq!((stage.import(id), stage.followers()), (("done".into(), 2, 1), 2));
}

#[test]
fn another_programs_import_may_have_a_prefix_that_nobody_could_choose_now() {
    for odd in ["\u{200b}", "zoe\u{308}", "аdmin", "a@b:c"] {
        let stage = Stage::new();
        let handled = stage.handle([received(&stage.foreign(odd, 3))]);
        assert!(handled.is_done(), "{odd}: {handled:?}");
        assert_eq!(stage.followers(), 3);
    }
}

#[test]
fn an_author_who_would_be_among_the_imported_is_skipped() {
    let db = TestDatabase::new();
    let author = db.user("fan_1", Channel::Email);
    let stage = Stage { db, author };
    let (id, order) = stage.order("fan", 3);
    assert!(stage.handle([received(&order)]).is_done());
    assert_eq!(stage.import(id), ("done".into(), 2, 1));
    assert_eq!(stage.db.count("SELECT count(*) AS n FROM subscription WHERE author_id = follower_id"), 0);
}

#[test]
fn what_cannot_be_done_is_set_aside_alone_and_the_import_says_why() {
    let stage = Stage::new();
    let (_, order) = stage.order("gone", 2);
    let other = Stage { author: stage.db.user("other", Channel::Email), db: stage.db };
    let unknown = AddFollowers { import_id: Some(ImportId(i64::MAX)), ..order.clone() };
    let messages = [
        received(&other.foreign("good", 2)),
        received(&unknown),
        received(&other.foreign("", 2)),
        received(&other.foreign("many", i64::from(LIMIT) + 1)),
        received(&other.foreign("none", 0)),
        received(&AddFollowers { user_id: UserId(i64::MAX), ..other.foreign("nobodys", 2) }),
        Received::new(queue::ADD_FOLLOWERS, r#"{"userId": 1}"#),
    ];
    let handled = other.handle(messages);
    let dead: Vec<_> = handled.dead.iter().map(|(place, _)| *place).collect();
    assert_eq!(dead, [1, 2, 3, 4, 5, 6], "{handled:?}");
    assert_eq!(other.followers(), 2, "the good one");
}

/// Else whoever deletes users could fill the operator's list.
#[test]
fn an_import_whose_author_is_deleted_has_failed_and_is_no_dead_letter() {
    let stage = Stage::new();
    let (begun, first) = stage.order("begun", 7);
    let (waiting, second) = stage.order("waiting", 2);
    stage.db.database().transaction(|conn| imports::step(conn, begun, STEP)).expect("a step");
    users::delete(&mut stage.db.database().connection().unwrap(), stage.author).unwrap();
    let handled = stage.handle([received(&first), received(&second), received(&stage.foreign("another", 2))]);
    assert!(handled.is_done(), "{handled:?}");
    assert_eq!((stage.import(begun), stage.import(waiting)), (("failed".into(), 3, 0), ("failed".into(), 0, 0)));
    assert_eq!(stage.followers(), 3, "what was done stays, and another program's order is passed over");
}

#[test]
fn what_no_column_holds_is_refused_at_once() {
    let stage = Stage::new();
    let raw = |body: &str| Received::new(queue::ADD_FOLLOWERS, body);
    let bad = [
        received(&stage.foreign("a\0b", 1)),
        received(&stage.foreign("huge", i64::MAX)),
        received(&stage.foreign("less", i64::MIN)),
        received(&AddFollowers { user_id: UserId(i64::MIN), ..stage.foreign("nobodys", 2) }),
        received(&AddFollowers { import_id: Some(ImportId(i64::MIN)), ..stage.foreign("none", 2) }),
        raw(r#"{"userId": 9223372036854775808, "followerLogin": "fan", "count": 1}"#),
        raw(r#"{"userId": 1, "followerLogin": "fan", "count": 1e300}"#),
    ];
    let count = bad.len();
    // With a limit that is beyond what the column holds.
    let handled = testing::handle(&mut Importer::new(stage.db.database().clone(), STEP, u32::MAX), bad);
    assert_eq!(handled.dead.len(), count, "{handled:?}");
    let more = received(&stage.foreign("more", i64::from(i32::MAX) + 1));
    let handled = testing::handle(&mut Importer::new(stage.db.database().clone(), STEP, u32::MAX), [more]);
    assert!(matches!(&handled.dead[..], [(0, why)] if why == "count must be between 1 and 2147483647"), "{handled:?}");
    assert_eq!(stage.followers(), 0);
}

#[test]
fn a_database_that_is_away_is_waited_for_and_a_query_that_fails_is_tried_again() {
    let stage = Stage::new();
    let (id, order) = stage.order("fan", 2);
    let away = testing::handle(&mut Importer::new(TestDatabase::unreachable(), STEP, LIMIT), [received(&order)]);
    assert_eq!(away.waiting, [0]);
    stage.db.execute("ALTER TABLE subscription RENAME TO elsewhere");
    let handled = stage.handle([received(&order)]);
    assert!(matches!(&handled.retried[..], [(0, why)] if why.contains("the query failed")), "{handled:?}");
    stage.db.execute("ALTER TABLE elsewhere RENAME TO subscription");
    assert!(stage.handle([received(&order)]).is_done());
    assert_eq!(stage.import(id), ("done".into(), 2, 0));
}
