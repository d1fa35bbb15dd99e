//! Users who follow each other and post.

use crate::{TestDatabase, sql};
use domain::{
    UserId,
    message::Tweet,
    values::{Channel, Contact, Email, Login, Phone, TweetText},
};
use storage::{
    subscriptions, tweets,
    users::{self, NewUser},
};

impl TestDatabase {
    /// A new user of this login, with an address of this channel.
    ///
    /// # Panics
    /// When the login has no valid form, or is taken.
    pub fn user(&self, login: &str, channel: Channel) -> UserId {
        let contact = match channel {
            Channel::Email => Contact::Email(Email::parse(&format!("{login}@example.com")).expect("an address")),
            Channel::Phone => Contact::Phone(Phone::parse("+14155550123").expect("a number")),
        };
        let login = Login::parse(login).expect("a login");
        let new =
            NewUser { login: &login, contact: &contact, password_hash: None, age: None, is_active: true, roles: &[] };
        self.ask(|conn| users::create(conn, &new)).id
    }

    /// Lets users follow an author, in this order.
    ///
    /// # Panics
    /// When one of them isn't there.
    pub fn follow(&self, author: UserId, followers: &[UserId]) {
        for follower in followers {
            let followed = self.database().transaction(|conn| subscriptions::create(conn, author, *follower));
            followed.expect("the users are there");
        }
    }

    /// Posts a tweet, which nobody sees yet.
    ///
    /// # Panics
    /// When the author isn't there.
    pub fn post(&self, author: UserId, text: &str) -> Tweet {
        let text = TweetText::parse(text).expect("a text");
        self.database().transaction(|conn| tweets::post(conn, author, &text)).expect("the author is there")
    }

    /// The ids that a query returns under the name `n`, in its order.
    ///
    /// # Panics
    /// When the query fails.
    pub fn ids(&self, sql: &str) -> Vec<i64> {
        self.ask(|conn| sql::numbers(conn, sql))
    }
}
