//! What is wrong on purpose, and must be found: the checker is on.

use crate::gate::Gate;
use crate::gate_models::Memory;
use crate::page_models::{install_and_look, states_of};
use crate::page_states::PageState;
use crate::{check, join, spawn};
use loom::sync::atomic::Ordering;
use std::sync::Arc;

#[test]
#[should_panic(expected = "a removed page was installed")]
fn an_installer_that_looks_before_it_enters_is_found() {
    check(|| {
        let memory = Memory::new();
        let installer = spawn(&memory, |memory| {
            let run = memory.absent();
            let pass = memory.gate.enter();
            run.into_iter().for_each(|run| memory.install(run));
            drop(pass);
        });
        memory.read();
        join([installer]);
        memory.assert_right();
    });
}

#[test]
#[should_panic(expected = "the pager and an installer were inside together")]
fn an_installer_that_does_not_enter_is_found() {
    check(|| {
        let memory = Memory::new();
        let installer = spawn(&memory, |memory| memory.install(1..2));
        memory.read();
        join([installer]);
        memory.assert_right();
    });
}

#[test]
#[should_panic(expected = "a change was lost")]
fn a_plain_store_is_found() {
    check(|| {
        let states = Arc::new(states_of(2));
        let installer = spawn(&states, |states| states.set_resident(0..2).unwrap());
        let word = states.own_word(0).unwrap();
        let removed = word.load(Ordering::Acquire) | PageState::Removed as u64;
        word.store(removed, Ordering::Release);
        join([installer]);
        let found = [0, 1].map(|page| states.get(page));
        assert_eq!(found, [PageState::Removed, PageState::Resident], "a change was lost");
    });
}

#[test]
#[should_panic(expected = "a resident page is not there")]
fn a_change_with_no_ordering_is_found() {
    check(|| {
        install_and_look(|states| {
            let word = states.own_word(0).unwrap();
            word.fetch_or(PageState::Resident as u64, Ordering::Relaxed);
        });
    });
}

#[test]
#[should_panic(expected = "deadlock")]
fn a_pager_that_gives_up_and_does_not_say_so_is_found() {
    check(|| {
        let gate = Arc::new(Gate::default());
        let installers = [(); 2].map(|()| spawn(&gate, |gate| drop(gate.enter())));
        drop(gate.try_enter_alone());
        join(installers);
    });
}
